"""Captions: inspection by the LLM, linting, review by a person."""
