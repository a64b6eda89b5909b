"""Memory of freed tensors stays resident."""

import subprocess
import sys

import pytest

from tests.launching import ROOT

PROGRAM = """
import sys, torch
from megatron_hbp.platform.malloc import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "keep":
    keep_freed_memory()
tensor = torch.ones(2**24)  # 64 MiB
before = resident()
del tensor
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_stays():
    def given_back(how: str) -> int:
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert given_back("by default") > 60 << 20
    assert given_back("keep") < 1 << 20
