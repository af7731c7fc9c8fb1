"""LLM providers through the openai package."""
