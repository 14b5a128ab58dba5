"""A finished OUT or index, shown: report, search, top, diff."""
