"""Encoders that measure: CLIP and DINO."""
