"""`likeness generate`: requests, models, and files of generated images."""
