"""Sampling of many images: in batches on one device, or in shards on several."""
