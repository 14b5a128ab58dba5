"""snip audit: a finished OUT recomputed from raw features, compared with its metadata."""
