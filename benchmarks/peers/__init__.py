"""Peers that need more than numpy (megatron-core, HiGHS), and a comparison of all peers with more measures.

`run.py` compares; `plug_in.py` hands megatron-core's scheduler to `hbp plan compare --peers`.
"""
