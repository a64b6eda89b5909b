"""The flags of `hbp profile`."""

import pytest

from megatron_hbp.errors import ConfigError
from megatron_hbp.profiling.options import ProfileOptions


def test_flags_of_training_and_shares_out_of_range_are_refused():
    for argv, says in (
        (["--hbp-plan", "x"], "--hbp-plan is for training"),
        (["--hbp-profile-supervised", "0"], "--hbp-profile-supervised"),
        (["--hbp-profile-seconds", "0"], "must be above 0"),
        (["--hbp-profile-seconds", "soon"], "invalid float"),
        (["--hbp-profile-lengths", "4k"], "--hbp-profile-lengths"),
    ):
        with pytest.raises(ConfigError, match=says):
            ProfileOptions.from_argv(argv)
    options = ProfileOptions.from_argv(["--hbp-profile-out", "a/b.json", "--num-layers", "3"])
    assert str(options.cost_file) == "a/b.cost.json" and options.degrees(12) == (1, 2, 4)
    with pytest.raises(ConfigError, match="--hbp-profile-cp 3 does not divide the 4"):
        ProfileOptions.from_argv(["--hbp-profile-cp", "3"]).degrees(4)
