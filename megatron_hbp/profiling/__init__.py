"""Times and memory of one micro-batch, over packing lengths, CP degrees and recompute policies, on the user's ranks."""
