"""The drawn world: objects, backgrounds, scenes and their captions."""
