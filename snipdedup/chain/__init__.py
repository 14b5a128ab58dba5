"""``snip dedup``: inputs, search, decision, files."""
