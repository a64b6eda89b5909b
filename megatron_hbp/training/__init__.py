"""Training on a plan inside Megatron-LM's loop: entry, hooks, metrics."""
