"""Models that others trained: found out, checked, and brought into the form of our own tuned models."""
