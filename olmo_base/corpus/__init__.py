"""Text files become token shards, token shards become batches."""
