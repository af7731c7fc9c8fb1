"""`likeness serve`: runs and reports by http."""
