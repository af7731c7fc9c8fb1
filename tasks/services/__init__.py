"""External services: object store, LLM providers, tracking. Independent of DreamBooth."""
