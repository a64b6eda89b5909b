"""The fit of rates to timings."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.calibrate import Timing, fit, predict
from megatron_hbp.errors import DataError
from megatron_hbp.planning import parse_tiers
from megatron_hbp.planning.cost.presets import preset

LLAMA = preset("llama3.1-8b-h100")
MACHINE = {"linear_rate": 3e14, "attention_rate": 2e14, "node_bandwidth": 6e10, "cluster_bandwidth": 1e10}


def test_a_fit_finds_the_rates_that_made_the_timings():
    tiers = parse_tiers("8192:cp1,16384:cp2:full8,65536:cp8:full28,131072:cp16:full16")
    rows = [Timing(label=str(t), tier=t, seconds=1.0, sample_tokens=x) for t in tiers for x in (0.0, 2048.0, "mixed")]
    truth = replace(LLAMA.with_machine(**MACHINE), micro_batch_seconds=0.4)
    seconds = predict(truth, rows, {"mixed": 5000.0})
    rows = [replace(row, seconds=value) for row, value in zip(rows, seconds.tolist(), strict=True)]
    found = fit(LLAMA, rows)
    assert [getattr(found.cost.machine, name) for name in MACHINE] == pytest.approx(list(MACHINE.values()), rel=1e-4)
    assert found.cost.micro_batch_seconds == pytest.approx(0.4, rel=1e-4)
    assert found.lengths["mixed"] == pytest.approx(5000, rel=1e-4)
    assert np.abs(found.errors).max() < 1e-6
    inside = [row for row in rows if row.tier.cp_degree <= 8]
    assert fit(LLAMA, inside).spread["cluster_bandwidth"] == np.inf
    with pytest.raises(DataError, match="cannot determine"):
        fit(LLAMA, rows[:4])
