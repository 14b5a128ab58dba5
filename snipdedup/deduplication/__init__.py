"""snip dedup: inputs, search, decision, the files of OUT."""
