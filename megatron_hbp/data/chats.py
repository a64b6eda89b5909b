"""A chat, the checks that every chat must pass, and the kinds of fault that make a record unusable.

A record that cannot be used raises `BadChat`, which names the file, the line and one kind of `Fault`, so that the
caller can stop at it (strict) or count it by its kind (lenient).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_hbp.errors import DataError

ROLES = ("system", "user", "assistant", "tool")

type Record = Mapping[str, object]
"""A decoded JSON object."""


class Fault(StrEnum):
    """What can be wrong with one record; the value appears in error messages and in the counts of `--lenient`."""

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
    """A record that cannot be used; `fault` is the kind of its fault."""

    def __init__(self, where: str, fault: Fault, detail: str) -> None:
        super().__init__(f"{where}: {fault}: {detail}. Fix the line, or pass --lenient to skip and count such lines")
        self.fault = fault


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One conversation and its origin (`file:line`). Messages have `role` and `content`, and may have more keys."""

    where: str
    messages: Sequence[Record]
    tools: Sequence[object] | None = None


def check_chat(chat: Chat) -> None:
    """Check the role and the content of every message, and that the assistant speaks; raises BadChat."""
    for number, message in enumerate(chat.messages, start=1):
        _check_message(message, number, chat.where)
    if not any(message["role"] == "assistant" for message in chat.messages):
        raise BadChat(chat.where, Fault.NO_ASSISTANT, "the loss is on assistant turns only")


def object_list(record: Record, key: str, where: str) -> list[Record]:
    """Return `record[key]`, which must be a non-empty list of objects; raises BadChat otherwise."""
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise BadChat(where, Fault.SHAPE, f'the object needs "{key}", a list with at least one message')
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise BadChat(where, Fault.SHAPE, f"message {number} is {json_type(value)}, not an object")
    return values


def json_type(value: object) -> str:
    """Name the type of a JSON value in JSON's terms, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _check_message(message: Record, number: int, where: str) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise BadChat(where, Fault.ROLE, f"message {number} has role {role!r}; known roles: {', '.join(ROLES)}")
    content = message.get("content")
    if role == "assistant" and message.get("tool_calls") and content in (None, ""):
        return  # a turn that only calls tools
    if not isinstance(content, str):
        raise BadChat(where, Fault.CONTENT, f"message {number} ({role}) has {json_type(content)} as content, not text")
    if role in ("user", "assistant") and not content.strip():
        raise BadChat(where, Fault.EMPTY, f"message {number} ({role}) has no text")
