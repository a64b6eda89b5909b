"""The model: Megatron-LM's GPT from its layer specs, made to work on packs under a CP group of the moment."""
