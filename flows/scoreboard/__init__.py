"""Methods x subjects x seeds, each a run of the public command line, as one table."""
