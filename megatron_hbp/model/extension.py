"""A killed build of Megatron-LM's C++ extension must not hang the runs after it.

Recompute of layernorm, mla_up_proj and moe_act shares storages through an extension that torch builds at first use,
in 20 to 60 s, under a lock file. A run that is killed meanwhile leaves the file behind, and torch.utils.cpp_extension
then waits for it without end (torch 2.13, utils/file_baton.py).
"""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

NAME = "share_storage_ext"
"""As in megatron/core/tensor_parallel/random.py of megatron-core 0.19.2."""
MODULES = frozenset({"layernorm", "mla_up_proj", "moe_act"})
STALE_SECONDS = 300.0


def drop_stale_lock(modules: Iterable[str], *, stale: float = STALE_SECONDS) -> None:
    """Where one of `modules` needs the extension, wait for its lock to go; delete one of more than `stale` seconds.

    On the first process of a node; the others wait for that one, or for the build.
    """
    if MODULES.isdisjoint(modules) or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    lock, warned = Path(_get_build_directory(NAME, verbose=False)) / "lock", False
    while lock.exists():
        try:
            left = lock.stat().st_mtime + stale - time.time()
        except FileNotFoundError:  # gone in between
            return
        if left <= 0:
            lock.unlink(missing_ok=True)
            print(f"> hbp: deleted {lock}, left by a run that was killed", file=sys.stderr, flush=True)
            return
        if not warned:
            print(f"> hbp: another run builds an extension ({lock}); waiting {left:.0f} s at most", file=sys.stderr)
            warned = True
        time.sleep(min(left, 1.0))
