"""Batch jobs that survive crashes, by the protocols of OpenAI, xAI and local programs."""
