"""A run is set up once: exchanges of the tiers, the model, and the record that is kept of it."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_hbp.errors import ConfigError, DiskError
from megatron_hbp.families import model_flags
from megatron_hbp.planning.core.machine import H100
from megatron_hbp.planning.core.model import AttentionShape
from megatron_hbp.planning.core.tiers import Recompute, Tier
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2
from megatron_hbp.runtime import record, setup
from megatron_hbp.runtime.options import HbpOptions, PlannedData
from megatron_hbp.runtime.setup import Runtime, resolve_tiers
from tests.equivalence.support.plans import plan_of
from tests.launching import ROOT

LLAMA_70B_TP8 = AttentionShape(num_query_heads=8, num_kv_heads=1, qk_width=128, v_width=128)
LENGTHS = np.array([1000, 30_000, 60_000])


def plan_with(**choices: Any):
    tiers = [
        Tier(packing_length=16_384), Tier(packing_length=32_768, cp_degree=2, **choices),
        Tier(packing_length=65_536, cp_degree=4),
    ]  # fmt: skip
    packs = [(0, 0, 0, 0, [0]), (0, 1, 0, 1, [1]), (0, 2, 0, 2, [2])]
    return plan_of(packs, tiers=tiers, lengths=LENGTHS, num_ranks=4)


def resolved(shape=LLAMA_70B_TP8, exchange=None):
    return resolve_tiers(plan_with(), shape, H100, exchange=exchange, kernel=None)


def test_auto_takes_the_cheapest_and_says_why():
    tiers, lines = resolved()
    assert [tier.exchange for tier in tiers] == ["a2a", "all_gather", "all_gather"]  # one KV head: keys are little
    assert [tier.is_zigzag for tier in tiers] == [False, True, True]
    assert len(lines) == 2 and all("exchange all_gather (exposed per layer: all_gather" in line for line in lines)
    assert [tier.exchange for tier in resolved(DEEPSEEK_V2.attention)[0]] == ["a2a", "qkv_latent", "qkv_latent"]


def test_a_tier_keeps_its_own_exchange_and_a_flag_overrides_it():
    tiers, lines = resolved()
    own, said = resolve_tiers(plan_with(exchange="p2p"), LLAMA_70B_TP8, H100, exchange=None, kernel=None)
    assert own[1].exchange == "p2p" and "p2p (as asked for)" in said[0] and own[2] == tiers[2] and lines[1] == said[1]
    over, _ = resolve_tiers(plan_with(exchange="p2p"), LLAMA_70B_TP8, H100, exchange="a2a", kernel="reference")
    assert [tier.exchange for tier in over] == ["a2a"] * 3 and {tier.kernel for tier in over} == {"reference"}


def test_an_exchange_that_cannot_be_is_refused_with_those_that_can():
    with pytest.raises(ConfigError) as refused:
        resolved(exchange="kv_latent")
    assert "no latent attention" in str(refused.value) and "a2a, all_gather, p2p" in str(refused.value)


def test_without_a_device_the_first_that_can_be_used_is_taken():
    tiers, lines = resolve_tiers(plan_with(), DEEPSEEK_V2.attention, None, exchange=None, kernel=None)
    assert [tier.exchange for tier in tiers] == ["a2a"] * 3 and all("no CUDA device" in line for line in lines)


def test_zigzag_that_does_not_divide_is_not_chosen():
    tiers = [Tier(packing_length=64), Tier(packing_length=126, cp_degree=2)]
    plan = plan_of([(0, 0, 0, 1, [0])], tiers=tiers, lengths=np.array([100]), num_ranks=2)
    found, _ = resolve_tiers(plan, LLAMA_70B_TP8, H100, exchange=None, kernel=None)
    assert found[1].exchange == "a2a" and not found[1].is_zigzag


def arguments(**changes: object) -> SimpleNamespace:
    values = {
        "num_attention_heads": 64, "group_query_attention": True, "num_query_groups": 8, "kv_channels": 128,
        "hidden_size": 8192, "multi_latent_attention": False, "tensor_model_parallel_size": 8, "num_layers": 2,
        "num_experts": None, "swiglu": True, "ffn_hidden_size": 28_672, "padded_vocab_size": 128_256,
        "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


# ---------------------------------------------------------------- set_up


POLICIES = {
    "tier A": Recompute(granularity="selective", modules=("mlp",)),
    "tier B": Recompute(granularity="selective", modules=("core_attn", "mlp")),
    "tier C": Recompute(granularity="full", num_layers=1),
}
MLA = {
    "multi_latent_attention": True, "num_attention_heads": 128, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
}  # fmt: skip


@pytest.fixture
def set_up(monkeypatch) -> Callable[..., Runtime]:
    """`set_up` with a stand-in for Megatron-LM's config, which has the attributes of the arguments."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(setup, "install_context_capture", lambda: None)
    monkeypatch.setattr(setup, "model_config", lambda args: SimpleNamespace(transformer=args, pre_wrap_hooks=[]))

    def make(
        policies: Any = None, *, shapes_vary: bool = False, exchange: str | None = None, **changes: Any
    ) -> Runtime:
        values: dict[str, Any] = {
            **dict.fromkeys(("fp8", "fp4", "recompute_granularity")), "recompute_modules": [],
            **dict.fromkeys(("expert_tensor_parallel_size", "expert_model_parallel_size"), 1),
            "pipeline_model_parallel_size": 1, "world_size": 8, "local_rank": 0, "apply_rope_fusion": True,
            "mla_down_proj_fusion": False, "params_dtype": torch.bfloat16,
        }  # fmt: skip
        options = dataclasses.replace(HbpOptions.from_argv([]), exchange=exchange)
        return setup.set_up(arguments(**values | changes), options, policies=policies or {}, shapes_vary=shapes_vary)

    return make


def test_the_model_is_built_for_all_policies_and_checked_against_them(set_up, monkeypatch):
    runtime = set_up(POLICIES, shapes_vary=True)
    args = runtime.args
    assert (args.recompute_granularity, args.recompute_modules) == ("selective", ["core_attn", "mlp"])
    assert args.variable_seq_lengths is runtime.model.transformer.variable_seq_lengths is True
    checked: list[Any] = []
    monkeypatch.setattr(runtime.switch, "check", checked.append)
    *_, take = runtime.model.pre_wrap_hooks
    assert take([]) == [] and checked == [POLICIES]
    assert set_up({"tier C": POLICIES["tier C"]}).args.recompute_granularity is None


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"multi_latent_attention": False}, "give --multi-latent-attention"),
        ({"fp8": "e4m3"}, "drop --fp8-format"),
        ({"mla_down_proj_fusion": True}, "drop --mla-down-proj-fusion"),
    ],
)
def test_the_true_reason_why_latents_cannot_be_exchanged_reaches_the_user(set_up, changes, why):
    """An MLA model under FP8 was said to have no latent attention."""
    with pytest.raises(ConfigError, match=f"exchange qkv_latent cannot be used: .*{why}") as refused:
        set_up(exchange="qkv_latent", **MLA | changes).resolve(plan_with())
    assert "one of a2a, all_gather, p2p" in str(refused.value) and "no latent attention" not in str(refused.value)
    assert [tier.exchange for tier in set_up(**MLA | changes).resolve(plan_with())[0]] == ["a2a"] * 3


def test_an_attention_kernel_that_cannot_run_is_refused(set_up):
    runtime = set_up()
    runtime = dataclasses.replace(runtime, options=dataclasses.replace(runtime.options, kernel="varlen"))
    with pytest.raises(ConfigError, match="attention kernel varlen cannot be used"):
        runtime.resolve(plan_with())


@pytest.mark.parametrize(
    "recipe, family, rope",
    [("recipes/deepseek-v2.sh", ["deepseek-v2"], "yarn"), ("scripts/profile_cuda.sh", [], "rope")],
)
def test_mla_starts_with_the_rope_fusion_that_is_the_default_on_cuda(set_up, monkeypatch, recipe, family, rope):
    """As the recipe, with its family's flags, and the script have it: no flags of the CPU layer, which hide it."""
    flags = " ".join([(ROOT / recipe).read_text(), *(word for name in family for word in model_flags(name))])
    assert re.search(rf"--rope-type\s+{rope}", flags) and "rope-fusion" not in flags
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args([])
    assert args.apply_rope_fusion

    def config(args: Any) -> Any:
        model = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "multi_latent_attention": True}
        transformer = MLATransformerConfig(**model, rope_type=rope, apply_rope_fusion=args.apply_rope_fusion)
        return SimpleNamespace(transformer=transformer, pre_wrap_hooks=[])

    if rope == "rope":
        with pytest.raises(ValueError, match="only works with YARN"):
            config(args)
    monkeypatch.setattr(setup, "model_config", config)
    runtime = set_up(**MLA)
    assert "rope fusion is off" in runtime.notes[0] and not runtime.model.transformer.apply_rope_fusion
    assert set_up(**MLA, apply_rope_fusion=False).notes == ()


def test_grouped_query_attention_keeps_its_rope_fusion(set_up):
    runtime = set_up()
    assert runtime.notes == () and runtime.args.apply_rope_fusion


def test_experts_that_do_not_fit_into_the_ranks(set_up):
    with pytest.raises(ConfigError, match="8 ranks cannot be divided into 2 expert tensor-parallel x 8 expert-par"):
        set_up(expert_tensor_parallel_size=2, expert_model_parallel_size=8)


# ---------------------------------------------------------------- the record


def test_the_record_of_a_run_has_what_was_decided(set_up, tmp_path):
    runtime = set_up(rank=0, data_parallel_size=4, lr=0.5, log_interval=100, **MLA)
    plan: Any = SimpleNamespace(hash="f" * 64)
    train = PlannedData(plan=plan, store=SimpleNamespace())  # type: ignore[arg-type]
    for run_dir in (None, tmp_path / "new" / "run"):
        options = dataclasses.replace(runtime.options, train=train, run_dir=run_dir, flags={"hbp_plan": "p"})
        runtime = dataclasses.replace(runtime, options=options)
        record.write_record(runtime, [(Tier(packing_length=64), Tier(packing_length=128, cp_degree=2))])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["run.json"]

    written = json.loads((tmp_path / "new" / "run" / "run.json").read_text())
    assert (written["kind"], written["version"]) == ("hbp run", 1)
    assert written["plans"] == [{"plan_hash": "f" * 64, "tiers": ["64:cp1", "128:cp2"]}]
    assert written["options"] == {"hbp_plan": "p"} and written["versions"]["torch"] == torch.__version__
    assert written["layout"]["world"] == 8 and written["layout"]["tensor_parallel"] == 8
    theirs = written["megatron_lm"]
    assert theirs["lr"] == 0.5 and theirs["kv_lora_rank"] == 512 and theirs["multi_latent_attention"] is True
    assert "log_interval" not in theirs and "bf16" not in theirs  # the default; not an argument of this run


def test_only_rank_0_writes_and_a_place_that_cannot_be_written_is_said(set_up, tmp_path):
    runtime = set_up(rank=1, data_parallel_size=1)
    (tmp_path / "file").touch()
    options = dataclasses.replace(runtime.options, run_dir=tmp_path / "file" / "run")
    record.write_record(dataclasses.replace(runtime, options=options), [])
    runtime.args.rank = 0
    with pytest.raises(DiskError, match=r"the record of the run could not be written to .*change --save"):
        record.write_record(dataclasses.replace(runtime, options=options), [])
