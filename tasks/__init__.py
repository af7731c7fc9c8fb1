"""The pipeline's stages, one folder each, and the code that they share."""
