"""Near pairs: the join, brute force, kNN on an index."""
