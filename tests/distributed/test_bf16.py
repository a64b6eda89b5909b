"""bf16 trains as fp32 does, to its rounding, through the real entry point with CP degrees mixed."""

import shlex

import pytest

from tests.distributed.conftest import steps_of, write_plan, write_store
from tests.distributed.test_resume import MODEL

DENSE = shlex.split("""
    --num-layers 2 --hidden-size 32 --num-attention-heads 8 --ffn-hidden-size 48 --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8
    --group-query-attention --num-query-groups 2 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 2
    --use-distributed-optimizer
""")
TIERS = "64:cp1,128:cp2:sel=core_attn+layernorm,256:cp2:full1"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_losses_are_close_to_fp32(train, tmp_path, model):
    store = write_store(tmp_path / "store", num_samples=30, seed=3)
    plan = write_plan(tmp_path / "plan", store, num_ranks=2, tiers=TIERS)
    assert set(plan.pack_cp.tolist()) == {1, 2}
    losses = {}
    for precision, flags in {"fp32": (), "bf16": ("--bf16",)}.items():
        ended = train(
            "--hbp-plan", tmp_path / "plan", "--hbp-store", tmp_path / "store",
            "--hbp-metrics", tmp_path / f"{precision}.jsonl", *(DENSE if model == "dense" else MODEL), *flags, ranks=2,
        )  # fmt: skip
        assert ended.code == 0, ended.err[-3000:]
        losses[precision] = [line["loss"] for line in steps_of(tmp_path / f"{precision}.jsonl")]
    assert losses["bf16"] != losses["fp32"]  # else nothing was rounded
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
