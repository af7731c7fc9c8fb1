"""The embedded default: a small drawn world, its models and its vision server."""
