"""Commands about many subjects: `run-many`."""
