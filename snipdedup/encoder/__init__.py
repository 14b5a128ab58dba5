"""The SNIP encoder: network, losses, training."""
