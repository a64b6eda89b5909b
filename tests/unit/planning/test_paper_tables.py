"""The benchmark of the paper's tables still runs: every plan it simulates is one that ranks can run."""

import numpy as np

from benchmarks.lengths import generate
from benchmarks.paper_tables import Study, calibrated, table_6


def test_table_6_can_be_simulated():
    lengths = np.append(generate("mix", num_samples=3000), 131072)
    rows = {row.quantity: row for row in table_6(Study(lengths, calibrated().cost))}
    for model in ("8B + balance", "70B", "Qwen2.5-32B"):
        assert 1 < rows[f"{model}: speed-up"].ours < 2, model
