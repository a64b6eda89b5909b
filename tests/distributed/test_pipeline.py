"""Two pipeline stages on plans of unequal local tokens, training and evaluation, through the entry point."""

import json
import math
import shlex

from tests.distributed.conftest import VOCABULARY, write_plan, write_store

TIERS = "64:cp1,256:cp1"
MODEL = shlex.split("""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8 --lr 3e-3
    --train-iters 2 --pipeline-model-parallel-size 2
""")


def test_stages_take_shapes_from_the_plans(train, tmp_path):
    """No flag asks for it, and no shape but the planned one is sent: the communicator checks each."""
    flags: list[object] = ["--hbp-metrics", tmp_path / "metrics.jsonl"]
    for seed, prefix in enumerate(("--hbp", "--hbp-valid")):
        store = write_store(tmp_path / f"store{seed}", num_samples=30, seed=seed)
        write_plan(tmp_path / f"plan{seed}", store, num_ranks=1, tiers=TIERS)
        flags += [f"{prefix}-plan", tmp_path / f"plan{seed}", f"{prefix}-store", tmp_path / f"store{seed}"]

    ended = train(*flags, *MODEL, ranks=2)

    assert ended.code == 0, ended.err[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "step", "validation", "summary"]
    assert all(abs(line["loss"] - math.log(VOCABULARY)) < 0.2 for line in lines[:3])
