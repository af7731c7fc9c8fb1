"""Training data: preprocessing, latents, batches, counter-based randomness."""
