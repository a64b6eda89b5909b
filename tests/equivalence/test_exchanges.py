"""Whatever the ranks of a pack exchange, outputs, gradients and bytes are what they should be."""

import pytest

from tests.launching import launch

EXACT = 1e-12
BREAKAGES = ["skipped step", "wrong merge", "gradient to the wrong owner", "causal misaligned"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """One launch of 4 ranks runs every case (tests/equivalence/support/exchanges.py)."""
    return launch("tests.equivalence.support.exchanges", ranks=4, tmp_path=tmp_path_factory.mktemp("exchanges"))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cp_degree", [2, 3, 4])
@pytest.mark.parametrize("exchange", ["a2a", "all_gather", "p2p"])
def test_attention_is_that_of_one_rank(found, exchange, cp_degree, layout):
    assert found["alone"][f"{exchange} cp{cp_degree} {layout}"] < EXACT


def test_ranks_without_shared_tokens_are_covered(found):
    assert found["idle ranks"] == {"a2a": 1, "all_gather": 1, "p2p": 1}


def test_received_bytes_are_those_of_the_plan(found):
    assert len(found["bytes"]) == 24
    for case, (forward, planned, backward) in found["bytes"].items():
        assert forward == planned, case
        # keys and values come again with their gradients; in fp64 both have 8 bytes
        assert backward == forward * (2 if case.startswith("p2p") else 1), case


def test_half_precision_is_summed_in_single(found):
    """bf16 rounds to 2^-9; a ring's gradients travel in fp32: 2 + 4 bytes back for 2 there."""
    assert all(error < 2**-6 for error, _ in found["half"].values()), found["half"]
    assert {name: ratio for name, (_, ratio) in found["half"].items()} == {"a2a": 1, "all_gather": 1, "p2p": 3}


@pytest.mark.parametrize("recompute", ["none", "full", "core_attn"])
@pytest.mark.parametrize(
    "tiers", ["all_gather", "p2p", "p2p contiguous", "a2a zigzag", "p2p, all_gather", "a2a, p2p"]
)  # fmt: skip
def test_a_step_equals_one_sample_at_a_time(found, tiers, recompute):
    assert found["model"][f"{tiers}; recompute {recompute}"] < EXACT


@pytest.mark.parametrize("exchange", ["a2a", "all_gather", "p2p"])
def test_ranks_of_padding_only_take_part(found, exchange):
    assert found["model"][f"{exchange}; to capacity"] < EXACT


@pytest.mark.parametrize("tiers", ["all_gather", "p2p", "a2a zigzag"])
def test_recompute_exchanges_again(found, tiers):
    """Of the 3 layers all run forward once more under core_attn, and 2 of them under full."""
    none, full, core_attn = (found["model bytes"][f"{tiers}; recompute {r}"] for r in ("none", "full", "core_attn"))
    assert 0 < none < full
    assert (core_attn - none) * 2 == (full - none) * 3


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_broken_on_purpose_is_seen(found, breakage):
    assert found["broken"][breakage] > 1e-3
    assert found["broken model"][breakage] > 1e-3


def test_table(found, capsys):
    """Print the table of covered cases."""
    with capsys.disabled():
        print("\nexchanges, fp64, 4 ranks: largest relative error of outputs and gradients, without a model")
        for case, error in found["alone"].items():
            print(f"  {case:42} {error:9.1e}")
        for case, (error, _) in found["half"].items():
            print(f"  {case + ' in bf16':42} {error:9.1e}")
        print("of a gradient of the dense model, tiers of CP degree 1, 2 and 4")
        for case, error in found["model"].items():
            print(f"  {case:42} {error:9.1e}")
        for case in BREAKAGES:
            print(f"  broken: {case:34} {found['broken'][case]:9.1e} {found['broken model'][case]:9.1e}")
        print("bytes received by a rank in one layer: forward, backward")
        for case, (forward, _, backward) in found["bytes"].items():
            print(f"  {case:42} {forward:9} {backward:9}")
