"""Pre-train a BERT encoder on Ray and watch its embeddings get better while it trains."""
