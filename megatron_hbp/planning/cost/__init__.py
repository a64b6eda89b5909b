"""What a micro-batch costs in seconds and bytes: cost models, profiles, memory."""
