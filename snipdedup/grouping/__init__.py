"""Who stays among the rows of a group."""
