"""`likeness scoreboard`."""
