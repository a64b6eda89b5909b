"""Resident memory that one micro-batch adds to a new process, on every rank: run by benchmarks.profile.

    HBP_RSS="TOKENS CP RECOMPUTE RESULT.json" python -m megatron_hbp.launch ... -m benchmarks.profile_rss [flags]

A short pack runs first, so that threads, tables and libraries are in memory; then the kernel's high-water mark is
reset (/proc/self/clear_refs), the micro-batch runs, and VmHWM is compared with the VmRSS before it. glibc is set to
return freed blocks at once, otherwise resident memory includes holes in its heap (94 MiB for 76, 174 MiB for 108).
"""

import ctypes
import json
import os
import sys
from pathlib import Path

from megatron_hbp.platform.malloc import M_MMAP_MAX, M_TRIM_THRESHOLD
from megatron_hbp.profiling.main import parse_quietly
from megatron_hbp.profiling.options import ProfileOptions
from megatron_hbp.runtime.program import leave

M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""


def main() -> None:
    """Write {"growth": bytes of the fullest rank} from rank 0."""
    tokens, cp_degree, recompute, result = os.environ["HBP_RSS"].split()
    argv = sys.argv[1:]
    options = ProfileOptions.from_argv(argv)
    args = parse_quietly(argv, options)
    from megatron_hbp.planning.cost.profile_table import Setting
    from megatron_hbp.profiling.measure import agree
    from megatron_hbp.profiling.packs import plan_of_one_pack
    from megatron_hbp.profiling.session import build

    session = build(args, options)
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_MMAP_MAX, 1 << 20), (M_MMAP_THRESHOLD, 1 << 16), (M_TRIM_THRESHOLD, 1 << 16)):
        mallopt(parameter, value)
    for length in (256 * int(cp_degree), int(tokens)):
        setting = Setting(tokens=length, cp_degree=int(cp_degree), recompute=recompute, shape="many")
        feed = session.feed(plan_of_one_pack(setting.sample_lengths(), setting.tier, session.num_ranks))
        session.clear_gradients()
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        session.forward_backward(feed)
    growth = agree(session, False, float(memory("VmHWM") - before))
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps({"growth": growth}))
    leave()


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    main()
