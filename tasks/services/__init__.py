"""The outside world: object store, LLM providers, tracking. Ignorant of DreamBooth."""
