"""Rows of features, wherever they lie, and the number that compares two of them."""
