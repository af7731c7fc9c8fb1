"""Sampling of many images: in batches on one device, or shared out to several."""
