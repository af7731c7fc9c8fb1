"""Encoders that measure: CLIP and DINO."""

VERSION = 1
"""Covered by the keys of every stage that measures: bump it where a change here alters what they compute."""
