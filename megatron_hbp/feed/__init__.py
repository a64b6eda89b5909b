"""A plan's micro-batches on one rank: tensors made ahead, in an order that ranks agree on, and their forward step."""
