"""Commands about cost and batch jobs."""
