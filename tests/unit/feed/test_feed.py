"""What a rank is fed, against plans written by hand. One process; a CP group is only a name here."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hbp.errors import PlanError
from megatron_hbp.feed.feed import DUMMY, Feed, MicroBatch, joint_policy
from megatron_hbp.parallel.groups import CpGroups
from megatron_hbp.planning.core.slices import PADDING_SEGMENT
from megatron_hbp.planning.core.tiers import Recompute, Tier
from megatron_hbp.runtime.checks import feed_unit
from tests.equivalence.support.plans import MemoryStore, plan_of

FULL = Recompute(granularity="full", num_layers=2)
SELECTIVE = Recompute(granularity="selective", modules=("core_attn",))
TIERS = (
    Tier(packing_length=8),
    Tier(packing_length=16, cp_degree=2, recompute=SELECTIVE),
    Tier(packing_length=32, cp_degree=4, recompute=FULL),
)
LENGTHS = [3, 1, 4, 9, 20, 2, 7]
# (step, slot, rank0, tier, samples): step 1 has one slot more, and ranks 1 and 3 nothing in it
PACKS = [
    (0, 0, 0, 1, [0, 1, 2]), (0, 0, 2, 0, [5]),
    (1, 0, 0, 2, [4]),
    (1, 1, 0, 0, [6]), (1, 1, 2, 1, [3]),
]  # fmt: skip
GROUPS = CpGroups(by_degree={2: "pair", 4: "quad"}, num_created=0)  # type: ignore[dict-item]


@pytest.fixture
def store() -> MemoryStore:
    """Token i of sample n is 100 * n + i + 1; the first token and every third are not to be predicted."""
    masks = [np.array([i % 3 != 0 for i in range(n)], np.uint8) for n in LENGTHS]
    return MemoryStore(samples=[(100 * n + np.arange(1, k + 1), masks[n]) for n, k in enumerate(LENGTHS)])


@pytest.fixture
def feed(store):
    def make(rank: int, *, tiers=TIERS, lengths=None, packs=PACKS, **settings: Any) -> Feed:
        plan = plan_of(packs, tiers=tiers, lengths=np.array(lengths or LENGTHS), num_ranks=4)
        settings = {"unit": 1, "full_length": False, "device": torch.device("cpu")} | settings
        return Feed(plan=plan, store=store, groups=GROUPS, rank=rank, **settings)  # type: ignore[arg-type]

    return make


def places(micro_batches: list[MicroBatch]) -> list[tuple[int, int, int]]:
    return [(each.step, each.slot, each.tier) for each in micro_batches]


def test_two_ranks_of_a_pack_by_hand(feed):
    left, right = (next(feed(rank)) for rank in (0, 1))

    assert left.tokens.tolist() == [[1, 2, 3, 101]] and right.tokens.tolist() == [[201, 202, 203, 204]]
    assert left.context.position_ids.tolist() == [0, 1, 2, 0] and right.context.position_ids.tolist() == [0, 1, 2, 3]
    assert left.context.sample_index.tolist() == [0, 0, 0, 1] and right.context.sample_index.tolist() == [2, 2, 2, 2]
    assert left.loss_rows.local.tolist() == [0, 1] and right.loss_rows.local.tolist() == [0, 1]
    assert left.loss_rows.labels.tolist() == [2, 3] and right.loss_rows.labels.tolist() == [202, 203]
    for each in (left, right):
        context = each.context
        assert context.max_seqlen == 4 and context.tier.exchange == "a2a"
        # every sample lies on one rank, but 10 against 16 squared tokens are uneven: they are shared
        assert context.split.shared.segments.q == (0, 3, 4, 8) and context.split.local is None
        assert (context.cp_group, context.tier.cp_degree, context.tier.recompute) == ("pair", 2, SELECTIVE)
        assert context.sample_tokens.tolist() == [3, 1, 4] and context.sample_supervised.tolist() == [2, 0, 2]
        assert (context.num_real_tokens, context.num_supervised_tokens) == (8, 4)
        assert each.loss_rows.cp_group == "pair" and each.sample_ids.tolist() == [0, 1, 2]
        assert each.num_local_tokens == 4 and each.tokens.dtype == torch.int64


def test_a_pack_is_padded_at_its_end_only(feed):
    """20 tokens over 4 ranks, a multiple of 3 each: 24, so the last rank has 2 of the sample and 4 of padding."""
    slices = [list(feed(rank, unit=3))[1] for rank in range(4)]
    assert [s.num_local_tokens for s in slices] == [6, 6, 6, 2]
    joined = torch.cat([s.tokens[0] for s in slices])
    assert joined.tolist() == [*range(401, 421), 0, 0, 0, 0]
    positions = torch.cat([s.context.position_ids for s in slices])
    assert positions.tolist() == [*range(20), 0, 1, 2, 3]
    assert torch.cat([s.context.is_real for s in slices]).tolist() == [True] * 20 + [False] * 4
    assert {s.context.split.shared.segments.q for s in slices} == {(0, 20)}
    assert [s.context.split.local and s.context.split.local.q for s in slices] == [None, None, None, (0, 4)]
    assert {s.context.cp_group for s in slices} == {"quad"}
    assert {s.context.num_real_tokens for s in slices} == {20}


def test_losses_are_distributed_evenly_over_the_ranks_of_a_pack(feed):
    """Of 13 supervised positions the slices hold 4, 4, 4 and 1; the ranks compute the losses of 3, 3, 3 and 4."""
    slices = [list(feed(rank, unit=3))[1].loss_rows for rank in range(4)]
    held = torch.cat([s.local + 6 * rank for rank, s in enumerate(slices)]).tolist()
    assert held == [i for i in range(19) if (i + 1) % 3]
    assert [s.rows_to for s in slices] == [(3, 1, 0, 0), (0, 2, 2, 0), (0, 0, 1, 3), (0, 0, 0, 1)]
    assert [s.rows_from for s in slices] == [(3, 0, 0, 0), (1, 2, 0, 0), (0, 2, 1, 0), (0, 0, 3, 1)]
    assert [len(s.labels) for s in slices] == [3, 3, 3, 4]
    assert torch.cat([s.labels for s in slices]).tolist() == [402 + i for i in held]


def test_alignment_and_unit_both_divide_the_local_tokens(feed):
    tiers = (Tier(packing_length=12, alignment=2), TIERS[1], TIERS[2])
    micro_batch = next(feed(2, tiers=tiers, unit=3))  # 2 tokens
    assert micro_batch.tokens.shape == (1, 6)


def test_every_rank_has_equally_many_micro_batches_and_order(feed):
    fed = {rank: list(feed(rank)) for rank in range(4)}
    assert places(fed[0]) == [(0, 0, 1), (1, 0, 2), (1, 1, 0)]
    assert places(fed[1]) == [(0, 0, 1), (1, 0, 2), (1, 1, DUMMY)]
    assert places(fed[2]) == [(0, 0, 0), (1, 0, 2), (1, 1, 1)]
    assert places(fed[3]) == [(0, 0, DUMMY), (1, 0, 2), (1, 1, 1)]


def test_a_dummy_weighs_nothing(feed):
    dummy = next(feed(3, unit=2))
    assert dummy.tier == DUMMY and dummy.num_local_tokens == 0 and dummy.context.num_supervised_tokens == 0
    assert dummy.loss_rows.local.tolist() == dummy.loss_rows.labels.tolist() == [] and dummy.loss_rows.cp_group is None
    assert dummy.context.is_real.tolist() == [False, False]
    assert dummy.tokens.tolist() == [[0, 0]] and dummy.sample_ids.tolist() == []
    assert dummy.context.tier.cp_degree == 1 and dummy.context.cp_group is None
    assert dummy.context.tier.recompute == Recompute() and dummy.context.split.local.q == (0, 2)
    assert dummy.context.position_ids.tolist() == [0, 1]


def test_full_length_pads_to_the_packing_length(feed):
    by_rank = {rank: list(feed(rank, full_length=True)) for rank in range(4)}
    for micro_batches in by_rank.values():
        assert {m.tokens.shape for m in micro_batches} == {(1, 8)}  # 8 / 1, 16 / 2, 32 / 4: the shape of every stage
    assert by_rank[3][0].loss_rows.local.tolist() == []  # a dummy too
    tiers = (*TIERS[:2], Tier(packing_length=4 * 2 * PADDING_SEGMENT, cp_degree=4))
    long = list(feed(0, tiers=tiers, full_length=True))[1]
    assert long.context.split.local.max_q <= PADDING_SEGMENT  # padding costs no square of its length


def test_truncated_samples_use_their_first_tokens(feed):
    short = [*LENGTHS[:4], 14, *LENGTHS[5:]]
    slices = [list(feed(rank, lengths=short))[1] for rank in range(4)]
    assert torch.cat([s.tokens[0] for s in slices]).tolist() == [*range(401, 415), 0, 0]
    labels = torch.cat([s.loss_rows.labels for s in slices]).tolist()
    assert labels == [401 + i for i in range(1, 14) if i % 3]  # nothing of the cut part is predicted


def test_a_plan_that_asks_for_more_tokens_than_there_are(feed):
    longer = [*LENGTHS[:4], 21, *LENGTHS[5:]]
    rank = feed(1, lengths=longer)
    next(rank)
    with pytest.raises(PlanError, match=r"uses 21 tokens of sample 4, the store has 20: .* other data"):
        next(rank)


def test_first_step_and_end(feed):
    resumed = feed(0, first_step=1)
    assert iter(resumed) is resumed
    assert places(list(resumed)) == [(1, 0, 2), (1, 1, 0)]
    assert list(feed(0, first_step=2)) == []


def test_cyclic_goes_round(feed):
    rank = feed(0, cyclic=True)
    twice = [next(rank) for _ in range(7)]
    assert places(twice) == places(twice[:3]) * 2 + places(twice[:1])
    assert torch.equal(twice[0].tokens, twice[3].tokens)
    assert places([next(feed(0, cyclic=True, first_step=3))]) == [(1, 0, 2)]


@pytest.mark.parametrize("settings", [{}, {"unit": 3}, {"full_length": True}])
def test_lengths_are_known_without_the_tokens(feed, settings):
    for rank in range(4):
        fed = feed(rank, **settings)
        for batch in list(fed):
            assert fed.local_tokens(batch.step, batch.slot) == batch.tokens.shape[1]


def test_joint_recompute_is_one_policy_a_slot(feed):
    alone = [[m.context.tier.recompute for m in feed(rank)] for rank in range(4)]
    assert alone == [[SELECTIVE, FULL, Recompute()], [SELECTIVE, FULL, Recompute()],
                     [Recompute(), FULL, SELECTIVE], [Recompute(), FULL, SELECTIVE]]  # fmt: skip
    for rank in range(4):  # dummies too: they pass their tokens to the experts
        assert [m.context.tier.recompute for m in feed(rank, joint_recompute=True)] == [SELECTIVE, FULL, SELECTIVE]


@pytest.mark.parametrize(
    "policies, joint",
    [
        ([], Recompute()),
        ([Recompute()], Recompute()),
        ([SELECTIVE, Recompute()], SELECTIVE),
        ([SELECTIVE, FULL], FULL),
        ([Recompute(granularity="full", num_layers=5), FULL], Recompute(granularity="full", num_layers=5)),
        (
            [Recompute(granularity="selective", modules=("moe", "mlp")), SELECTIVE, SELECTIVE],
            Recompute(granularity="selective", modules=("core_attn", "mlp", "moe")),
        ),
    ],
)
def test_joint_policy(policies, joint):
    assert joint_policy(policies) == joint
    assert joint_policy(policies[::-1]) == joint


def test_groups_are_asked_by_degree():
    pair: Any = SimpleNamespace(name="pair")
    groups = CpGroups(by_degree={2: pair}, num_created=1)
    assert groups.group(1) is None and groups.group(2) is pair
    with pytest.raises(KeyError):
        groups.group(4)


@pytest.mark.parametrize(
    "precision, block",
    [
        ({}, 1),
        ({"fp8": "hybrid", "fp8_recipe": "delayed"}, 16),
        ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, 16),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, 32),
        ({"fp4": "e2m1", "fp4_recipe": "nvfp4"}, 128),
    ],
)
@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_quantised_layers_get_tokens_in_blocks(feed, precision, block, tp, sequence_parallel):
    """On every tensor-parallel rank, in each slot, dummies included: ranks 1 and 3 have some."""
    values = {"fp8": None, "fp4": None, "tensor_model_parallel_size": tp, "sequence_parallel": sequence_parallel}
    unit = feed_unit(SimpleNamespace(**values | precision))
    assert unit == block * (tp if sequence_parallel else 1)
    for rank in range(4):
        made = list(feed(rank, unit=unit))
        assert any(each.tier == DUMMY for each in made) == (rank in (1, 3))
        for each in made:
            assert each.tokens.shape[1] % unit == 0 and each.tokens.shape[1] > 0
            assert each.tokens.shape[1] == feed(rank, unit=unit).local_tokens(each.step, each.slot)
