"""A load on any OpenAI-compatible server, and how fast it answers."""
