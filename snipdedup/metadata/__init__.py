"""Tables beside the features: filter, join, export."""
