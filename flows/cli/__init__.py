"""The `likeness` command: one folder per panel of its help, whose `commands.py` registers itself."""
