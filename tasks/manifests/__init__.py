"""What stages exchange: small frozen records of references, digests, counts and settings."""
