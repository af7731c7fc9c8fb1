"""Encoders of the metrics: CLIP and DINO."""

VERSION = 1
"""Part of the cache key of every stage that computes metrics: bump it where a change here alters them."""
