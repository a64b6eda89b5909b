"""Plan files: magic, the plan's canonical bytes, their SHA-256. No pickle; any flipped bit is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hbp.errors import ConfigError, PlanError
from megatron_hbp.planning.core.json_files import write_whole
from megatron_hbp.planning.core.plan import COLUMNS, SCHEMA_VERSION, DataFingerprint, Plan
from megatron_hbp.planning.core.samples import Samples
from megatron_hbp.planning.core.tiers import parse_tiers

MAGIC = b"HBPPLAN\n"
_DIGEST_SIZE = 32


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where saving to `path` would replace something: a plan without `overwrite`, any other file."""
    if not path.name:
        raise ConfigError(f"--out {str(path)!r} does not name a file; give one")
    if not path.exists():
        return
    if not path.is_file() or not _is_plan(path):
        raise ConfigError(f"--out {path} exists and is not a plan, so it is not overwritten; choose another name")
    if not overwrite:
        raise ConfigError(f"--out {path} is a plan already; choose another name, or pass --overwrite to replace it")


def save(plan: Plan, path: str | Path) -> None:
    """Write `plan` to `path`, whole or not at all. Raises DiskError."""
    body = plan.canonical_bytes()
    write_whole(Path(path), (MAGIC, body, hashlib.sha256(body).digest()), "plan", "--out")


def load(path: str | Path) -> Plan:
    """Read a plan and check it. Raises PlanError for a missing, damaged or inconsistent file or another version."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PlanError(f"plan {path} cannot be read: {error.strerror}") from error
    if not raw.startswith(MAGIC):
        raise PlanError(f"{path} is not a plan file; make one with `hbp plan --out FILE`")
    body, digest = raw[len(MAGIC) : -_DIGEST_SIZE], raw[-_DIGEST_SIZE:]
    if len(raw) < len(MAGIC) + 8 + _DIGEST_SIZE or hashlib.sha256(body).digest() != digest:
        raise PlanError(f"plan {path} is damaged (its SHA-256 does not match); make it again or copy it anew")
    plan = _decode(body, path)
    plan.check()
    return plan


def check_data(plan: Plan, samples: Samples) -> None:
    """Raise PlanError unless `plan` was made for these lengths (and this store, where both name one)."""
    found = DataFingerprint.of(samples)
    if found.lengths_sha256 != plan.data.lengths_sha256:
        raise PlanError(
            f"the plan belongs to other data: it was made for lengths {plan.data.lengths_sha256} "
            f"({plan.data.num_samples} samples), the data has {found.lengths_sha256} ({found.num_samples} samples); "
            "plan again for this data"
        )
    stores = (plan.data.store_fingerprint, found.store_fingerprint)
    if None not in stores and stores[0] != stores[1]:
        raise PlanError(
            f"the plan belongs to another token store: it was made for {stores[0]}, this store is {stores[1]}; plan "
            "again with --store"
        )


def _is_plan(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _decode(body: bytes, path: Path) -> Plan:
    header_end = 8 + int.from_bytes(body[:8], "little")
    try:
        header = json.loads(body[8:header_end])
        version = header.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise PlanError(
                f"plan {path} has format version {version}, this program reads {SCHEMA_VERSION}; make it again with "
                "`hbp plan`"
            )
        columns: dict[str, Any] = _columns(header.pop("columns"), body[header_end:])
        tiers = parse_tiers(",".join(header.pop("tiers")))
        data = DataFingerprint(**header.pop("data"))
        return Plan(tiers=tiers, data=data, **columns, **header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"plan {path} has a header that does not make sense ({error}); make it again") from error


def _columns(sizes: dict[str, int], raw: bytes) -> dict[str, np.ndarray]:
    columns, position = {}, 0
    for name, kind in COLUMNS.items():
        columns[name] = np.frombuffer(raw, kind, sizes[name], position)
        position += columns[name].nbytes
    if position != len(raw):
        raise ValueError("columns and file size disagree")
    return columns
