"""Completions of several turns: tools, web search, conversations."""
