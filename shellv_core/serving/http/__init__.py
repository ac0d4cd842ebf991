"""The parts of the HTTP API: bodies, answers, fences. `shellv_core.serving.api` puts them together.

Knows nothing of torch, of where a model came from, or of how many there are.
"""
