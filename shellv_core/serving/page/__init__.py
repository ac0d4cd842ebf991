"""The parts of the chat page, each a client of the HTTP API; `shellv_core.serving.ui` puts them together."""
