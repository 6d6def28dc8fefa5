"""Text to token shards, and back. Not here: batches (data.py)."""
