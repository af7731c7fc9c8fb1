"""LoRA adapters and the file formats that other tools read."""
