"""What fits: pipelines in flight against brute force, bytes by hand, and one answer for plans and selections."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.core.machine import Topology
from megatron_hbp.planning.core.pipeline import run_pipeline, stage_orders
from megatron_hbp.planning.cost.memory import fitted, in_flight, memory_of, problem, state_bytes, token_bytes
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2, LLAMA_8B, LLAMA_70B, preset
from tests.unit.planning.plans import plan_of

LLAMA = preset("llama3.1-8b-h100")
PARAMETERS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 2 * 4096 * 128256
"""8.03e9."""
LAYER_BYTES = 2 * (4 * 4096 + 10240 + 3 * 14336)
"""Per token: 139,264."""


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_memory_is_the_worst_window_of_1f1b(p, held):
    grid = p * np.array(held, float)[None, :, None]
    for stage in range(p):
        windows = [sum(held[first : first + p - stage]) for first in range(len(held))]
        assert in_flight(grid, 0 * grid, stage=stage, num_stages=p)[0, 0] == pytest.approx(max(windows))


@pytest.mark.parametrize("p", [2, 4])
def test_memory_of_interleaved_stages_is_what_lies_between_forward_and_backward(p):
    m, v = 3 * p, 2
    rng = np.random.default_rng(p)
    held = rng.integers(1, 50, m).astype(float)
    passes = list(run_pipeline(rng.uniform(1, 2, (1, m)), rng.uniform(1, 2, (1, m)), num_stages=p, num_chunks=v))
    for stage in range(p):
        own = [one for one in passes if one.stage == stage]
        ends = {(one.chunk, one.micro_batch): one.end[0] for one in own if one.backward}
        spans = [
            (one.start[0], ends[one.chunk, one.micro_batch], held[one.micro_batch]) for one in own if not one.backward
        ]
        peak = max(sum(size for start, end, size in spans if start <= now < end) for now, _, _ in spans)
        grid = p * v * held[None, :, None]
        found = in_flight(grid, 0 * grid, stage=stage, num_stages=p, num_chunks=v)
        assert found[0, 0] == pytest.approx(peak)


@pytest.mark.parametrize(("p", "v"), [(1, 1), (3, 1), (2, 2)])
def test_a_layer_is_rebuilt_while_its_own_micro_batch_is_in_flight(p, v):
    """What one micro-batch rebuilds was added to the most that others keep, though they never are there together."""
    m = 3 * p
    rng = np.random.default_rng(p)
    held, rebuilt = rng.integers(1, 50, m).astype(float), rng.integers(0, 90, m).astype(float)
    for stage, passes in enumerate(stage_orders(p, m, v)):
        inside: list[tuple[int, int]] = []
        most = 0.0
        for backward, chunk, batch in passes:
            if backward:
                most = max(most, sum(held[one] for _, one in inside) / (p * v) + rebuilt[batch])
                inside.remove((chunk, batch))
            else:
                inside.append((chunk, batch))
                most = max(most, sum(held[one] for _, one in inside) / (p * v))
        grids = held[None, :, None], rebuilt[None, :, None]
        assert in_flight(*grids, stage=stage, num_stages=p, num_chunks=v)[0, 0] == pytest.approx(most)
        assert inside == []


def test_states_by_hand():
    """bf16 weights and fp32 gradients on every rank, Adam's 12 bytes divided over all; or all 18 divided."""
    assert state_bytes(LLAMA_8B, Topology(num_nodes=1)) == pytest.approx(PARAMETERS * (6 + 12 / 8))
    assert state_bytes(LLAMA_8B, Topology(num_nodes=4, fully_sharded=True)) == pytest.approx(PARAMETERS * 18 / 32)
    assert state_bytes(LLAMA_8B, Topology(num_nodes=4, tp=2, pp=2)) == pytest.approx(PARAMETERS / 4 * (6 + 12 / 8))
    experts = 59 * 160 * 3 * 5120 * 1536
    others = 235_741_434_880 - (2 * 60 + 1) * 5120 - 60 * (1536 + 512) - experts  # norms are left out
    assert state_bytes(DEEPSEEK_V2, Topology(num_nodes=16, pp=4, ep=8)) == pytest.approx(
        others / 4 * (6 + 12 / 32) + experts / 32 * (6 + 12 / 4)
    )


def test_bytes_per_token_by_hand():
    none, some, every, modules = (
        token_bytes(tier, LLAMA_8B) for tier in parse_tiers("8:cp1,16:cp1:full8,32:cp1:full32,64:cp1:sel=mlp")
    )
    assert none == (32 * LAYER_BYTES, 0)
    assert some == (24 * LAYER_BYTES + 8 * 2 * 4096, LAYER_BYTES)  # a recomputed layer keeps its input
    assert every == (32 * 2 * 4096, LAYER_BYTES)
    assert modules == (32 * LAYER_BYTES, LAYER_BYTES)  # shapes do not tell what a module keeps


def test_the_fullest_rank_of_the_fullest_step_counts():
    plan = plan_of([100, 90, 1000, 10], "1024:cp1:full8", num_ranks=2, step_tokens=2048)
    found = memory_of(plan, LLAMA, Topology(num_nodes=1, gpus_per_node=2))
    fullest = int(plan.pack_tokens.max())
    assert found.activations == pytest.approx(fullest * (25 * LAYER_BYTES + 8 * 2 * 4096))
    assert (found.step, found.rank) == (0, int(plan.pack_rank0[plan.pack_tokens.argmax()]))
    assert found.states == pytest.approx(PARAMETERS * (6 + 12 / 2))
    assert (found.limit, found.reserve) == (80e9, 4e9)
    assert found.headroom == pytest.approx(80e9 - 4e9 - found.states - found.activations)


def test_a_table_of_this_many_ranks_is_believed_and_fewer_ranks_must_agree_with_the_estimate():
    assert fitted(LLAMA, Topology.of_ranks(32)) == fitted(LLAMA, Topology.of_ranks(64)) == LLAMA
    few = fitted(LLAMA, Topology.of_ranks(4))
    room = 80e9 - 4e9 - PARAMETERS * (6 + 12 / 4)
    for local, layers in few.recompute_layers:
        known = min(count for tokens, count in LLAMA.recompute_layers if local <= tokens)
        least = next(n for n in range(33) if local * ((33 - n if n else 32) * LAYER_BYTES + n * 8192) <= room)
        assert layers == max(known, least)
    # 3.7 GB beside the states: 16K tokens need 6.6 GB at least, 8K tokens all but none of the layers recomputed
    assert few.recompute_layers[-1] == (8192, 32) and len(few.recompute_layers) == 3
    assert few.recompute_ranks == 4


def test_what_is_said_with_memory_replaces_all_that_is_known():
    said = fitted(LLAMA, Topology.of_ranks(4), ((1024, 0), (4096, 3)))
    assert (said.recompute_layers, said.recompute_ranks) == (((1024, 0), (4096, 3)), 0)


def test_a_model_that_does_not_fit_at_all_says_what_it_would_take():
    seventy = replace(LLAMA, model=LLAMA_70B, recompute_layers=())
    with pytest.raises(ConfigError, match=r"llama3.1-70b does not fit 8 GPUs of 80 GB: .* take 529 GB of each"):
        fitted(seventy, Topology.of_ranks(8))
    assert fitted(seventy, Topology.of_ranks(8, tp=8)).recompute_layers


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ("8192:cp1:full32", ""),
        ("8192:cp1:none", "tier 8192:cp1 needs full23 to fit; write it into the tier, or raise its CP degree"),
        ("8192:cp1:full22", "tier 8192:cp1:full22 needs full23 to fit"),
        ("32768:cp1:full32", "tier 32768:cp1:full32 keeps 32768 tokens on a rank, at most 16384 fit; raise its CP"),
        ("4096:cp1:sel=core_attn", "3.0 GB are missing on 8 GPUs of 80 GB (states 60.2, activations 18.8, reserve 4.0"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(tiers, says):
    """On 8 ranks by the table of the selection; modules, which the table does not know, by the estimate."""
    topology = Topology.of_ranks(8)
    cost = fitted(LLAMA, topology)
    plan = plan_of(np.full(64, 4096), tiers, num_ranks=8, step_tokens=10**6, cost=LLAMA)
    found = problem(plan, cost, topology)
    assert found.startswith(says) and bool(found) == bool(says)


@pytest.mark.parametrize("cut", [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 4}, {"pp": 4, "virtual_stages": 2}])
@pytest.mark.parametrize("measured", [LLAMA, replace(LLAMA, recompute_layers=())], ids=["table", "estimate"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_what_the_fitted_table_allows_fits_by_the_estimate_of_a_full_plan(ranks, measured, cut):
    """The plan of packs that are full to the last token, in every setting of the table."""
    topology = Topology.of_ranks(ranks, **cut)
    try:
        cost = fitted(measured, topology)
    except ConfigError:
        assert (ranks, cut) == (2, {})  # 2 GPUs do not hold the states
        return
    for local, layers in cost.recompute_layers:
        tier = f"{local}:cp1:full{layers}" if layers else f"{local}:cp1"
        plan = plan_of(np.full(ranks * 16, local), tier, num_ranks=ranks, step_tokens=ranks * 16 * local)
        assert memory_of(plan, cost, topology).headroom >= 0, tier
        assert problem(plan, cost, topology) == "", tier
