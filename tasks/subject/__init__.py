"""The subject stage."""
