"""snip eval: what short descriptors and codes keep, against brute force."""
