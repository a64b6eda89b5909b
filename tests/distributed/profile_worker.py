"""`hbp profile` on two ranks, with memory running out on rank 1 for one row: once alone, once amid an exchange."""

import os

import torch

from megatron_hbp.profiling import main
from megatron_hbp.runtime.program import platform_flags


def break_one_row() -> None:
    """Raise in forward and backward of the row that HBP_TEST_BREAKS names, on rank 1 only."""
    platform_flags()  # before anything of Megatron-LM is imported
    from megatron_hbp.profiling.session import Session

    plain = Session.forward_backward

    def forward_backward(session, feed, *args):
        tier = feed.plan.tiers[0]
        if str(tier) == os.environ.get("HBP_TEST_BREAKS") and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("out of memory, on purpose")
        plain(session, feed, *args)

    setattr(Session, "forward_backward", forward_backward)  # noqa: B010 (mypy refuses to assign to a method)


if __name__ == "__main__":
    break_one_row()
    main.main()
