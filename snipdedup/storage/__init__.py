"""Files of this machine and of others: written whole, locked, sorted, read by ranges."""
