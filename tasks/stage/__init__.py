"""What every stage stands on: digests, verified records, atomic files, worker processes."""
