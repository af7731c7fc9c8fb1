"""Captions: inspection by the LLM, linting, interactive review."""
