"""The prior stage."""
