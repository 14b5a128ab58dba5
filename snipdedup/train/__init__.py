"""The SNIP encoder: learnt, kept, measured."""
