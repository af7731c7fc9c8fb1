"""The supervised worker processes, one per device."""
