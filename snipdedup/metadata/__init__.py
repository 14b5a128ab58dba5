"""The tables beside the features: filtered, joined, handed over."""
