"""snip eval and snip plan: what codes keep; what a run will cost."""
