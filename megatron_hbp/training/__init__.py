"""Training on a plan inside Megatron-LM's loop: options, feed, forward step, hooks, metrics."""
