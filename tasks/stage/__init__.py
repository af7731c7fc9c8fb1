"""Shared by all stages: digests, verified records, atomic files, worker processes."""
