"""Text to shards: documents from files, sentences, windows, and the job that writes them."""
