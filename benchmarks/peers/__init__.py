"""Peers: planners of others that HBP is compared with, written against the public API of megatron_hbp.planning.

The peers live here, outside the package, as some need more than numpy (megatron-core, HiGHS). `run.py` compares those
with the signature of `common.py`; `plug_in.py` hands planners with the signature of
megatron_hbp.planning.peers to `hbp plan compare --peers`.
"""
