"""The directory on disk: manifest, tensors, feature table; digests; atomic writes. Format version 1."""
