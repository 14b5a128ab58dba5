"""The rows, the shards, files that appear whole."""
