"""Commands that run flows: `run`, `sweep`, `pending`."""
