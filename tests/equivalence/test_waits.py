"""After the first step nothing of ours makes the host wait for the device in a training step."""

from typing import Any

import pytest

from tests.launching import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    return launch("tests.equivalence.support.waits", ranks=2, tmp_path=tmp_path_factory.mktemp("waits"))


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_no_call_of_ours_waits(found, model):
    ours, _ = found[model]
    assert ours == {}


def test_one_that_waits_is_seen_with_its_line(found):
    ours, _ = found["dense, broken"]
    assert sum(n for call, n in ours.items() if call.startswith("model/broken.py:3 ")) >= 2 * 3  # 2 steps, 3 slots
    ours, _ = found["summary"]
    assert any("metrics.py" in call and call.endswith("tolist") for call in ours)


def test_table(found, capsys):
    with capsys.disabled():
        for model in ("dense", "moe"):
            ours, theirs = found[model]
            print(f"\n{model}, two steps of three micro-batches: waits of ours {sum(ours.values())}, of Megatron-LM's:")
            for call, n in sorted(theirs.items()):
                print(f"  {n:4} {call}")
