"""The yardstick: seconds between two readings at the speed of the reference."""

import pytest

from megatron_hbp.profiling.yardstick import Yardstick


def test_a_slow_machine_is_corrected_for():
    yardstick = Yardstick()
    assert yardstick.reference > 0 and yardstick.read() > 0
    yardstick.reference = 0.02
    assert yardstick.corrected(1.0, 0.02, 0.02) == 1.0
    assert yardstick.corrected(1.5, 0.03, 0.03) == pytest.approx(1.0)  # half as slow again throughout
    assert yardstick.corrected(1.25, 0.02, 0.03) == pytest.approx(1.0)
