"""Directories for transformers and sentence-transformers, with a model card."""
