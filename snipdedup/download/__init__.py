"""Sets, parts of sets and finished folders, fetched."""
