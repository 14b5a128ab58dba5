"""Groups of near-duplicates, and which of their rows are kept."""
