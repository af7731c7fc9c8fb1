"""The `likeness` command, one file per group of commands."""
