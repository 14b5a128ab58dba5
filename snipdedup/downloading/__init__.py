"""snip download: metadata, feature sets and published results, fetched and filtered."""
