"""What a run is set up from: Megatron-LM's arguments, and what packs of samples require of them."""
