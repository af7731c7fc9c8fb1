"""Configuration: YAML holds values, `schema.py` holds their shape."""
