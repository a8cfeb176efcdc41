"""Token vectors from co-occurrence, as the start of an embedding table: counts, their factors, and the file of them."""
