"""Model families, one adapter file each."""
