"""JSON files that carry their kind and version: written whole or not at all, checked before anything is computed.

A reader accepts exactly one version. Another one is refused in a line that says how to make the file anew: profiles and
cost models take minutes to measure, and a wrong migration would be believed.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_hbp.errors import ConfigError, DiskError


def write_whole(path: Path, parts: Iterable[bytes], what: str, flag: str) -> None:
    """Write `path` whole or not at all, flushed to the disk. Raises DiskError naming `what` and its flag."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise DiskError(
            f"{what} could not be written to {path}: {error.strerror}; free space or change {flag}"
        ) from error


def write_json(values: Mapping[str, Any], path: Path, what: str, flag: str) -> None:
    """Write a JSON object; see `write_whole`."""
    write_whole(path, [json.dumps(values, indent=1).encode(), b"\n"], what, flag)


def read_json(path: Path, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """The JSON object of a file of this kind and version. Raises ConfigError saying what it is instead."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: not JSON ({error}); {remedy}") from error
    if not isinstance(values, dict) or values.get("kind") != kind:
        raise ConfigError(f"{path} is not a {kind.removeprefix('hbp ')}; {remedy}")
    if values.get("version") != version:
        raise ConfigError(f"{path} has version {values.get('version')}, this program reads {version}; {remedy}")
    return values


def check_numbers(
    values: Mapping[str, Any], names: Iterable[str], *, least: float = 0.0, whole: bool = False, none: bool = False
) -> None:
    """Raise ValueError naming the first of `names` that is not a finite number of at least `least`.

    `whole` requires whole numbers; `none` lets null pass.
    """
    for name in names:
        value = values[name]
        if none and value is None:
            continue
        if not is_number(value, least=least, whole=whole):
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"{name} is {value!r}, not {kind} of at least {least:g}")


def is_number(value: object, *, least: float = 0.0, whole: bool = False) -> bool:
    """Whether `value` is a finite number of at least `least`; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return least <= value < math.inf
