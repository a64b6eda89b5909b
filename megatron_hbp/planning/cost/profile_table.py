"""What `hbp profile` measured: one row per (packing length, CP degree, recompute, shape of pack), as versioned JSON.

Seconds are those of the forward and backward of one micro-batch over the whole depth of the model: device time on CUDA,
process CPU time on CPU, at the speed of the yardstick; the median of the repeats, of a gang's slowest rank, of the
median gang. Bytes are those of the fullest rank: on CUDA what the allocator reserves plus what lies outside it
(communicators, context), on CPU what torch's allocator holds at its highest above what stood before (weights, gradients
and optimizer are not in it).
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_hbp.errors import ConfigError
from megatron_hbp.planning.core.exchanges import EXCHANGES
from megatron_hbp.planning.core.json_files import check_numbers, read_json, write_json
from megatron_hbp.planning.core.model import ModelSpec
from megatron_hbp.planning.core.tiers import Recompute, Tier
from megatron_hbp.planning.cost.file import model_from_json

KIND = "hbp profile table"
VERSION = 3

Shape = Literal["one", "many"]
SHAPES: dict[Shape, int] = {"one": 1, "many": 8}
"""Shape of a pack -> its samples: one as long as the pack, or uneven ones that fill it. Tokens and squares come apart
only over both."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one row measures."""

    tokens: int
    """Tokens of the pack, all real: the packing length."""
    cp_degree: int
    recompute: str
    """As in a tier: none, full12, sel=core_attn+mlp."""
    shape: Shape = "one"

    @property
    def tier(self) -> Tier:
        """The tier whose full pack this is."""
        return Tier(packing_length=self.tokens, cp_degree=self.cp_degree, recompute=self.policy)

    @property
    def policy(self) -> Recompute:
        """The recompute policy. Raises ConfigError where `recompute` is not one."""
        policy = Recompute.parse(self.recompute)
        if policy is None:
            raise ConfigError(f"recompute policy {self.recompute!r} is unknown; it is none, fullN or sel=MODULE+MODULE")
        return policy

    @property
    def local_tokens(self) -> int:
        """Tokens on one rank."""
        return self.tokens // self.cp_degree

    def sample_lengths(self) -> np.ndarray:
        """int64 [samples], the same in every process: shares between half and one and a half of the mean."""
        count = min(SHAPES[self.shape], self.tokens // 2)
        shares = np.cumsum(0.5 + np.random.default_rng(self.tokens + count).random(count))
        ends = np.rint(shares / shares[-1] * self.tokens).astype(np.int64)
        return np.diff(ends, prepend=0)

    @property
    def squares(self) -> int:
        """Sum of squared sample lengths."""
        return int((self.sample_lengths() ** 2).sum())

    def __str__(self) -> str:
        return f"{self.tokens}:cp{self.cp_degree}:{self.recompute}, {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row."""

    tokens: int
    cp_degree: int
    recompute: str
    shape: Shape
    squares: int
    """Sum of squared sample lengths of the pack."""
    seconds: float | None
    """None where it did not fit."""
    repeats: int
    spread: float
    """Interquartile range of the repeats over their median, on the rank that spreads most."""
    peak_bytes: int | None
    """None where it did not fit, and on CPU for packs of many samples."""
    saved_bytes: int | None = None
    """What autograd holds between forward and backward (CPU only)."""
    fits: bool
    why: str = ""
    """Where it does not fit: "out of memory" (tried), or what predicted so."""

    @property
    def setting(self) -> Setting:
        """What it measured."""
        return Setting(tokens=self.tokens, cp_degree=self.cp_degree, recompute=self.recompute, shape=self.shape)


@dataclass(frozen=True, kw_only=True)
class ProfileHeader:
    """Where and with what the rows were measured; only equal headers share a table."""

    device: str
    versions: dict[str, str]
    model: ModelSpec
    flags: str
    """SHA-256 (hex) of every Megatron-LM argument that shapes the model or its layout."""
    layout: dict[str, int]
    """world, data_parallel, tensor_parallel, pipeline_parallel, expert_parallel, node_size (ranks)."""
    dtype: str
    exchange: str
    """What the ranks of a pack exchanged, in all rows: times of several would not lie on one line."""
    supervised: float
    """Share of the tokens whose loss is computed."""
    logits_bytes: float
    """What one such token holds while its loss is computed: logits, their softmax and gradient."""
    logits_rows: int
    """How many of them a rank computes at a time."""
    memory: str
    """What `peak_bytes` counts."""


@dataclass(frozen=True, kw_only=True)
class ProfileTable:
    """Header and rows."""

    header: ProfileHeader
    rows: tuple[Measurement, ...] = ()
    memory_limit: float | None = field(default=None)
    """Bytes that `peak_bytes` may reach; None: unlimited."""
    yardstick: float | None = None
    """On CPU the seconds of the yardstick (profiling/yardstick.py) at the speed that all rows are converted to."""

    def find(self, setting: Setting) -> Measurement | None:
        """The row of this setting."""
        return next((row for row in self.rows if row.setting == setting), None)

    def with_row(self, row: Measurement) -> "ProfileTable":
        """The table with one row more (instead of an older one of the same setting)."""
        others = tuple(known for known in self.rows if known.setting != row.setting)
        return replace(self, rows=(*others, row))


def save(table: ProfileTable, path: Path) -> None:
    """Write the table, whole or not at all. Raises DiskError."""
    write_json({"kind": KIND, "version": VERSION, **asdict(table)}, path, "profile table", "--hbp-profile-out")


def load(path: Path) -> ProfileTable:
    """Read a table. Raises ConfigError for a missing or damaged file, another kind or another version."""
    values = read_json(path, KIND, VERSION, "profile it again with `hbp profile` into another file")
    try:
        check_numbers(values, ("memory_limit", "yardstick"), none=True)
        header = _header(values["header"])
        return ProfileTable(
            header=header, rows=tuple(_row(row, header.model.num_layers) for row in values["rows"]),
            memory_limit=values["memory_limit"], yardstick=values["yardstick"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ConfigError(f"profile table {path} is damaged ({error}); delete it and profile again") from error


def _header(values: dict[str, Any]) -> ProfileHeader:
    header = dict(values)
    model = model_from_json(header.pop("model"))
    check_numbers(header, ("supervised", "logits_bytes"))
    check_numbers(header, ("logits_rows",), whole=True)
    names = ("world", "data_parallel", "tensor_parallel", "pipeline_parallel", "expert_parallel", "node_size")
    check_numbers(header["layout"], names, least=1, whole=True)
    if header["exchange"] not in EXCHANGES:
        raise ValueError(f"exchange is {header['exchange']!r}")
    return ProfileHeader(model=model, **header)


def _row(values: dict[str, Any], num_layers: int) -> Measurement:
    check_numbers(values, ("tokens", "cp_degree"), least=1, whole=True)
    check_numbers(values, ("squares", "repeats"), whole=True)
    check_numbers(values, ("spread",))
    check_numbers(values, ("seconds", "peak_bytes", "saved_bytes"), none=True)
    row = Measurement(**values)
    if (
        not isinstance(row.fits, bool)
        or row.setting.policy.num_layers > num_layers
        or str(row.setting.policy) != row.recompute
        or row.setting.squares != row.squares
        or (row.fits and not (row.seconds and row.seconds > 0))
    ):
        raise ValueError(f"row {row.setting} contradicts itself")
    return row


def check_header(found: ProfileHeader, expected: ProfileHeader, path: Path) -> None:
    """Raise ConfigError naming the first fields in which a table's header differs from this run's."""
    different = [f.name for f in fields(ProfileHeader) if getattr(found, f.name) != getattr(expected, f.name)]
    if different:
        differences = "; ".join(
            f"{name}: {getattr(found, name)} there, {getattr(expected, name)} here" for name in different
        )
        raise ConfigError(
            f"profile table {path} was measured otherwise ({differences}): give another --hbp-profile-out, or delete it"
        )
