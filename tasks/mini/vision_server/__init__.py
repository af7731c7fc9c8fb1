"""The OpenAI-compatible vision server of the drawn world."""
