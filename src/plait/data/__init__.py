"""Text from files to token shards, and token shards to batches that resume by arithmetic."""
