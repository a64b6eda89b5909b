"""The exceptions of megatron_hbp and the exit codes they end a program with.

    HbpError (70)
    ├── DataError (65)       chats, token stores: what the user fed in cannot be used
    ├── ConfigError (78)     flags, tiers, model and parallel layout that do not fit together
    │   └── PlanError (78)   a plan that is damaged, or belongs to other data or another layout
    ├── DiskError (73)       something could not be written
    ├── StopRequested (75)   stopped on request, after saving
    └── DivergedError (70)   NaN or Inf in loss or gradients

The codes are those of sysexits.h. A message says what is wrong, where, and what to do about it; a user never sees a
traceback for any of these. `assert` is for our own mistakes.
"""


class HbpError(Exception):
    """Root of everything that megatron_hbp raises on purpose."""

    exit_code = 70
    is_everywhere = False
    """Whether all ranks raise it, so that one of them is enough to print it."""


class DataError(HbpError):
    """Input data cannot be used; the message names file and line."""

    exit_code = 65


class ConfigError(HbpError):
    """Options that contradict each other or the model."""

    exit_code = 78


class PlanError(ConfigError):
    """A plan file that is damaged or belongs to other data, tokens or ranks."""


class DiskError(HbpError):
    """A file could not be written."""

    exit_code = 73


class StopRequested(HbpError):
    """The run was asked to stop and has saved."""

    exit_code = 75


class DivergedError(HbpError):
    """A loss or a gradient is not finite."""


def everywhere[E: HbpError](error: E) -> E:
    """`error`, for a raise that all ranks come to."""
    error.is_everywhere = True
    return error
