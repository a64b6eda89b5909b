"""What the ranks of a context-parallel group exchange in attention, one module per exchange, found by its name.

The traits of each are a row of planning/core/exchanges.py. Every exchange gives the attention of the queries that lie
here over the shared samples. `x_r` are this rank's tokens of the shared samples (model/split.py), out is [x_r, h, dv].

An exchange of queries, keys and values has

    start(q [x_r, h, d], k [x_r, k, d], v [x_r, k, dv], shared, group) -> finish(kernel, scale) -> out

where what is started runs beside the attention to local samples. One of MLA's latents (`needs_latents`) has

    gather(q_latent, kv_latent, split, group) -> what is up-projected here
    project(up_projection, gathered, w_q, w_kv, shared, group) -> tensors, recomputed in the backward if asked
    attend(up_projection, projected, kv_latent, w_kv, kernel, scale, shared, group) -> out
"""

import functools
import importlib
from types import ModuleType


@functools.cache
def implementation(name: str) -> ModuleType:
    """The module of exchange `name`."""
    return importlib.import_module(f"{__name__}.{name}")
