"""Object stores behind one protocol: a local folder, and S3."""
