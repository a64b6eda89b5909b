"""Chat JSONL, one object a line: `{"messages": [{"role": "user", "content": "..."}, ...]}`.

A line that cannot be used becomes a `BadChat`, which names file, line and one kind of `Fault`, so that the caller may
stop at it (strict) or count it by its kind (lenient).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_hbp.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


class Fault(StrEnum):
    """What can be wrong with one line; the value is the wording of messages and of the lenient count."""

    NUL = "NUL byte"
    UTF8 = "bad UTF-8"
    JSON = "bad JSON"
    SHAPE = "no list of messages"
    ROLE = "wrong role"
    CONTENT = "content is not text"
    EMPTY = "empty content"
    NO_ASSISTANT = "no assistant turn"
    TEMPLATE = "refused by the chat template"
    NO_LOSS = "no token to learn from"
    TOO_LONG = "longer than --max-length"


class BadChat(DataError):
    """One line that cannot be used; `fault` is its kind."""

    def __init__(self, where: str, fault: Fault, detail: str) -> None:
        super().__init__(f"{where}: {fault}: {detail}. Fix the line, or pass --lenient to skip and count such lines")
        self.fault = fault


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One conversation with at least one assistant turn, and where it came from (`file:line`)."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chat file, without its line end."""

    where: str
    raw: bytes


@dataclass(kw_only=True)
class ChatFile:
    """A chat file that is read once from start to end, counting and hashing what it has read."""

    path: Path
    num_lines: int = 0
    bytes_read: int = 0
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

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
    """Size of all inputs together in bytes; raises DataError for the first that is not a readable file.

    Asked before any work starts: a misspelt last input should not cost the hours spent on the first.
    """
    total = 0
    for path in paths:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "no such file"
            raise DataError(f"{path}: {problem}; --input wants a JSONL file, one chat a line")
        try:
            with path.open("rb"):
                total += path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    return total


def parse_chat(line: Line) -> Chat:
    """Decode and check one line; raises BadChat."""
    record = _decode(line)
    if not isinstance(record, dict):
        raise BadChat(line.where, Fault.SHAPE, f"the line holds {_kind(record)}, not an object")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadChat(line.where, Fault.SHAPE, 'the object needs "messages", a list with at least one message')
    for number, message in enumerate(messages, start=1):
        _check_message(message, number, line.where)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadChat(line.where, Fault.NO_ASSISTANT, "the loss is on assistant turns only")
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadChat(line.where, Fault.SHAPE, f'"tools" is {_kind(tools)}, not a list')
    return Chat(where=line.where, messages=messages, tools=tools)


def _decode(line: Line) -> Any:
    if b"\x00" in line.raw:
        column = line.raw.index(b"\x00") + 1
        raise BadChat(line.where, Fault.NUL, f"byte {column} of the line is NUL; the file may be truncated or binary")
    try:
        text = line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadChat(line.where, Fault.UTF8, f"byte {error.start + 1} of the line: {error.reason}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadChat(line.where, Fault.JSON, f"{error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise BadChat(line.where, Fault.JSON, str(error)) from error


def _check_message(message: Any, number: int, where: str) -> None:
    if not isinstance(message, dict):
        raise BadChat(where, Fault.SHAPE, f"message {number} is {_kind(message)}, not an object")
    role = message.get("role")
    if role not in ROLES:
        raise BadChat(where, Fault.ROLE, f"message {number} has role {role!r}; known are {', '.join(ROLES)}")
    content = message.get("content")
    if role == "assistant" and message.get("tool_calls") and content in (None, ""):
        return  # a turn that only calls tools
    if not isinstance(content, str):
        raise BadChat(where, Fault.CONTENT, f"message {number} ({role}) has {_kind(content)} as its content, not text")
    if role in ("user", "assistant") and not content.strip():
        raise BadChat(where, Fault.EMPTY, f"message {number} ({role}) says nothing")


def _kind(value: Any) -> str:
    """Name a JSON value's type in JSON's own words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), "a number")
