"""The join: all near-duplicate pairs of a set, each proved on the raw rows."""
