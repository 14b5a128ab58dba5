"""snip audit: a finished OUT proved against raw features and metadata."""
