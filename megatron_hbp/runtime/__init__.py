"""A run on packs, set up once for every program: options, Megatron-LM's arguments, `Runtime`, record, exit codes.

It builds on the feed of `training/`; the programs of `training/` and `profiling/` build on it.
"""
