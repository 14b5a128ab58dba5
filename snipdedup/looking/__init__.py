"""A finished OUT and an index, looked at."""
