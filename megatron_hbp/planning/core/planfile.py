"""Plan files: magic, the plan's canonical bytes, their SHA-256. No pickle; any flipped bit is refused."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hbp.errors import ConfigError, DiskError, PlanError
from megatron_hbp.planning.core.plan import COLUMNS, SCHEMA_VERSION, DataFingerprint, Plan
from megatron_hbp.planning.core.tiers import Recompute, Tier

MAGIC = b"HBPPLAN\n"
_DIGEST_SIZE = 32


def save(plan: Plan, path: str | Path) -> None:
    """Write `plan` to `path`, whole or not at all. Raises DiskError."""
    path = Path(path)
    if not path.name:
        raise ConfigError(f"--out {str(path)!r} is no file; name one")
    body = plan.canonical_bytes()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for part in (MAGIC, body, hashlib.sha256(body).digest()):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise DiskError(f"plan could not be written to {path}: {error.strerror}; free space or choose --out") from error


def load(path: str | Path) -> Plan:
    """Read a plan and check it. Raises PlanError for a missing, damaged or inconsistent file or another version."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PlanError(f"plan {path} cannot be read: {error.strerror}") from error
    if not raw.startswith(MAGIC):
        raise PlanError(f"{path} is not a plan file; make one with `hbp plan --out {path}`")
    body, digest = raw[len(MAGIC) : -_DIGEST_SIZE], raw[-_DIGEST_SIZE:]
    if len(raw) < len(MAGIC) + 8 + _DIGEST_SIZE or hashlib.sha256(body).digest() != digest:
        raise PlanError(f"plan {path} is damaged (its SHA-256 does not match); make it again or copy it anew")
    plan = _decode(body, path)
    plan.check()
    return plan


def check_data(plan: Plan, lengths: np.ndarray, store_fingerprint: str | None = None) -> None:
    """Raise PlanError unless `plan` was made for these lengths (and this store, where both name one)."""
    found = DataFingerprint.of(lengths, store_fingerprint)
    if found.lengths_sha256 != plan.data.lengths_sha256:
        raise PlanError(
            f"the plan belongs to other data: it was made for lengths {plan.data.lengths_sha256} "
            f"({plan.data.num_samples} samples), the data has {found.lengths_sha256} ({found.num_samples} samples); "
            "plan again for this data"
        )
    if None not in (plan.data.store_fingerprint, store_fingerprint) and (
        plan.data.store_fingerprint != store_fingerprint
    ):
        raise PlanError(
            f"the plan belongs to another token store: it was made for {plan.data.store_fingerprint}, "
            f"this store is {store_fingerprint}; plan again with --store"
        )


def _decode(body: bytes, path: Path) -> Plan:
    header_end = 8 + int.from_bytes(body[:8], "little")
    try:
        header = json.loads(body[8:header_end])
        version = header["schema_version"]
        if version != SCHEMA_VERSION:
            raise PlanError(f"plan {path} has format version {version}, this reads {SCHEMA_VERSION}; plan again")
        columns: dict[str, Any] = _columns(header.pop("columns"), body[header_end:])
        tiers = tuple(_tier(fields) for fields in header.pop("tiers"))
        data = DataFingerprint(**header.pop("data"))
        del header["schema_version"]
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


def _tier(fields: dict) -> Tier:
    recompute = fields.pop("recompute")
    return Tier(recompute=Recompute(**recompute | {"modules": tuple(recompute["modules"])}), **fields)
