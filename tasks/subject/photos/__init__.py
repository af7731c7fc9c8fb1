"""Photos: decoding, measuring, duplicates, known subjects."""
