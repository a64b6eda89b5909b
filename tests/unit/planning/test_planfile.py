"""A plan file comes back whole or is refused."""

import dataclasses
import hashlib

import numpy as np
import pytest

from megatron_hbp.errors import DiskError, PlanError
from megatron_hbp.planning import check_data, load, make_plan, parse_tiers, save
from megatron_hbp.planning.core.planfile import MAGIC
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.request import Request

LENGTHS = np.concatenate([np.random.default_rng(0).integers(1, 50, 56), [200, 130, 100, 256]])


@pytest.fixture
def plan():
    return make_plan(
        Samples.of(LENGTHS), Request(tiers=parse_tiers("64:cp1:full2,256:cp4"), num_ranks=4, step_tokens=512)
    )


def test_round_trip(plan, tmp_path):
    save(plan, tmp_path / "PLAN")
    loaded = load(tmp_path / "PLAN")
    assert loaded.hash == plan.hash
    assert loaded.tiers == plan.tiers and loaded.data == plan.data
    assert loaded.pack_at(0, 0, 0) == plan.pack_at(0, 0, 0)
    assert list(tmp_path.iterdir()) == [tmp_path / "PLAN"]  # no temporary file stays


def test_every_flipped_bit_is_refused(plan, tmp_path):
    save(plan, tmp_path / "PLAN")
    raw = (tmp_path / "PLAN").read_bytes()
    for position in range(0, len(raw), max(1, len(raw) // 200)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "PLAN").write_bytes(bytes(damaged))
        with pytest.raises(PlanError):
            load(tmp_path / "PLAN")


@pytest.mark.parametrize("size", [0, 5, 8, 20, 47, 100, -1])
def test_truncated(plan, tmp_path, size):
    save(plan, tmp_path / "PLAN")
    raw = (tmp_path / "PLAN").read_bytes()
    (tmp_path / "PLAN").write_bytes(raw[:size])
    with pytest.raises(PlanError):
        load(tmp_path / "PLAN")


def rewrite(plan, path, old, new):
    """Change the header and make the checksum fit again."""
    body = plan.canonical_bytes()
    size = int.from_bytes(body[:8], "little")
    header = body[8 : 8 + size].replace(old, new)
    body = len(header).to_bytes(8, "little") + header + body[8 + size :]
    path.write_bytes(MAGIC + body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"schema_version":2', b'"schema_version":9', "format version 9"),
        (b'"num_ranks":4', b'"num_ranks":2', "inconsistent"),
        (b'"seed":0', b'"sead":0', "does not make sense"),
        (b'"lengths":60', b'"lengths":59', "does not make sense"),
        (b'"packing_length":64', b'"packing_length":32', "over its packing length"),
    ],
)
def test_a_header_that_lies(plan, tmp_path, old, new, message):
    rewrite(plan, tmp_path / "PLAN", old, new)
    with pytest.raises(PlanError, match=message):
        load(tmp_path / "PLAN")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("sample_ids", 60, "outside the data"),
        ("pack_tier", 2, "unknown tier"),
        ("pack_rank0", 99, "gang outside"),
        ("pack_slot", 99, "outside the slots"),
        ("lengths", 0, "below one token"),
    ],
)
def test_columns_that_contradict(plan, column, value, message):
    changed = getattr(plan, column).copy()
    changed[0] = value
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, **{column: changed}).check()


def test_two_packs_on_one_rank(plan):
    moved = np.zeros_like(plan.pack_rank0)
    with pytest.raises(PlanError, match="two packs on one rank"):
        dataclasses.replace(plan, pack_rank0=moved).check()


def test_other_data(plan):
    check_data(plan, LENGTHS)
    other = LENGTHS.copy()
    other[3] += 1
    with pytest.raises(PlanError) as caught:
        check_data(plan, other)
    assert plan.data.lengths_sha256 in str(caught.value)
    assert hashlib.sha256(other.astype("<i8").tobytes()).hexdigest() in str(caught.value)


def test_other_store():
    plan = make_plan(
        Samples.of(LENGTHS, store_fingerprint="aa"), Request(tiers=parse_tiers("256:cp1"), num_ranks=1, step_tokens=512)
    )
    check_data(plan, LENGTHS, "aa")
    check_data(plan, LENGTHS)
    with pytest.raises(PlanError, match="another token store"):
        check_data(plan, LENGTHS, "bb")


def test_missing_and_unwritable(plan, tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        save(plan, tmp_path / "file" / "PLAN")
