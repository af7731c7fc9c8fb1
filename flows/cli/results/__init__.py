"""Commands about runs and their results."""
