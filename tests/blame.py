"""Whose call is it: the innermost frame that is Megatron-LM's or ours."""

from pathlib import Path
from types import FrameType

OURS, THEIRS = "/megatron_hbp/", "/site-packages/megatron/"


def caller(frame: FrameType | None) -> tuple[bool, str] | None:
    """(is it ours, "folder/file.py:line"), from `frame` outwards; None where neither is on the stack.

    The platform layer is passed over: it stands in for CUDA, where there is none.
    """
    while frame is not None:
        file = frame.f_code.co_filename
        if THEIRS in file or (OURS in file and "/platform/" not in file):
            return THEIRS not in file, f"{Path(file).parent.name}/{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return None
