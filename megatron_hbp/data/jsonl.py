"""JSONL files: bytes to lines to decoded JSON objects. What an object means is decided in `formats/`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hbp.data.chats import BadChat, Fault, Record, json_type
from megatron_hbp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a file, without its line end."""

    where: str
    raw: bytes


@dataclass(kw_only=True)
class JsonlFile:
    """A JSONL file that is read once from start to end, counting and hashing what it has read."""

    path: Path
    num_lines: int = 0
    bytes_read: int = 0
    _digest: "hashlib._Hash" = field(default_factory=hashlib.sha256, repr=False)

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes read so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Line]:
        """Yield the lines that are not blank; raises DataError when the file cannot be read."""
        try:
            with self.path.open("rb") as stream:
                for raw in stream:
                    self.num_lines += 1
                    self.bytes_read += len(raw)
                    self._digest.update(raw)
                    if content := raw.strip(b" \t\r\n"):
                        yield Line(where=f"{self.path}:{self.num_lines}", raw=content)
        except OSError as error:
            raise DataError(f"{self.path}:{self.num_lines + 1}: cannot be read: {error.strerror}") from error


def input_bytes(paths: Sequence[Path]) -> int:
    """Return the size of all inputs together in bytes; raises DataError for the first that is not a readable file.

    Called before any work starts: a misspelt last input must not cost the hours spent on the first.
    """
    total = 0
    for path in paths:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "no such file"
            raise DataError(f"{path}: {problem}; --input requires a JSONL file with one chat per line")
        try:
            with path.open("rb"):
                total += path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    return total


def decode(line: Line) -> Record:
    """Decode one line, which must hold a JSON object; raises BadChat."""
    if b"\x00" in line.raw:
        column = line.raw.index(b"\x00") + 1
        raise BadChat(line.where, Fault.NUL, f"byte {column} of the line is NUL; the file may be truncated or binary")
    try:
        record = json.loads(line.raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadChat(line.where, Fault.UTF8, f"byte {error.start + 1} of the line: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise BadChat(line.where, Fault.JSON, f"{error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise BadChat(line.where, Fault.JSON, str(error)) from error
    if not isinstance(record, dict):
        raise BadChat(line.where, Fault.SHAPE, f"the line holds {json_type(record)}, not an object")
    return record
