"""A token store, plans for it, and the real entry point on gloo ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hbp.data.manifest import TokenizerInfo
from megatron_hbp.data.store import TokenStore
from megatron_hbp.data.writer import StoreWriter
from megatron_hbp.planning.core import planfile
from megatron_hbp.planning.core.plan import Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import parse_tiers
from megatron_hbp.planning.planner import make_plan
from megatron_hbp.planning.request import Request
from tests.launching import ROOT

VOCABULARY = 96
TIERS = "64:cp1,128:cp2:sel=core_attn+layernorm,256:cp4:full1"


def write_store(
    folder: Path, *, seed: int, num_samples: int = 0, lengths: Sequence[int] | np.ndarray | None = None
) -> TokenStore:
    """A store of random chats, mostly short, some long unless `lengths` are given; two thirds are to be predicted."""
    rng = np.random.default_rng(seed)
    if lengths is None:
        is_short = rng.random(num_samples) < 0.8
        lengths = np.where(is_short, rng.integers(2, 60, num_samples), rng.integers(66, 250, num_samples))
    tokenizer = TokenizerInfo(
        name="none", sha256="0" * 64, chat_template_sha256="0" * 64, vocab_size=VOCABULARY, eos_id=None, pad_id=None
    )
    with StoreWriter(folder) as writer:
        for n in lengths:
            writer.add(rng.integers(0, VOCABULARY, n, np.int32), (rng.random(n) < 0.67).astype(np.uint8))
        writer.finish(tokenizer=tokenizer, sources=[])
    return TokenStore.open(folder)


def write_plan(path: Path, store: TokenStore, *, num_ranks: int, tiers: str = TIERS, seed: int = 0) -> Plan:
    """A real plan over the whole store."""
    samples = Samples.of(store.lengths, store_fingerprint=store.fingerprint)
    plan = make_plan(samples, Request(tiers=parse_tiers(tiers), num_ranks=num_ranks, step_tokens=512, seed=seed))
    planfile.save(plan, path)
    return plan


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run of the entry point ended."""

    code: int
    out: str
    err: str

    def messages(self) -> list[str]:
        """The lines that the program itself wrote on stderr."""
        return [line for line in self.err.splitlines() if "pretrain_hbp:" in line]


@pytest.fixture(scope="session")
def train() -> Callable[..., Ended]:
    """Run `python -m megatron_hbp.launch --nproc-per-node RANKS pretrain_hbp.py FLAGS` to its end."""

    def run(*flags: object, ranks: int) -> Ended:
        command = [sys.executable, "-m", "megatron_hbp.launch", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {name: value for name, value in os.environ.items() if name != "HBP_EXIT_CODE_FILE"}
        done = subprocess.run(
            [*command, "pretrain_hbp.py", *map(str, flags)],
            cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return Ended(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


def steps_of(metrics: Path) -> list[dict[str, Any]]:
    """The lines of training steps in a metrics file."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]
