"""Records to chats, by the format that recognises them."""

import dataclasses

import pytest

from megatron_hbp.data import formats
from megatron_hbp.data.chats import BadChat, Chat, Fault, Record
from megatron_hbp.data.formats import FORMATS, messages, read_chat
from megatron_hbp.data.formats.chat_format import ChatFormat
from tests.unit.data.conftest import turns


def swap_roles(record: Record, where: str) -> Chat:
    """A second format: the assistant speaks first."""
    chat = messages.to_chat({"messages": record["swapped"]}, where)
    roles = {"user": "assistant", "assistant": "user"}
    return dataclasses.replace(
        chat, messages=[{**message, "role": roles[str(message["role"])]} for message in chat.messages]
    )


@pytest.fixture
def two_formats(monkeypatch):
    other = ChatFormat(name="swapped", keys=frozenset({"swapped", "version"}), to_chat=swap_roles)
    monkeypatch.setattr(formats, "FORMATS", (messages.FORMAT, other))


def test_messages_and_tools_are_taken_as_they_are():
    messages, tools = turns("Hello", "Paris."), [{"name": "search"}]
    chat = read_chat({"messages": messages, "tools": tools, "origin": "somewhere"}, "here:1")
    assert chat == Chat(where="here:1", messages=messages, tools=tools)


def test_the_format_that_recognises_a_record_reads_it(two_formats):
    chat = turns("Hello", "Paris.")
    records: dict[str, Record] = {"user": {"messages": chat}, "assistant": {"swapped": chat, "version": 2}}
    for first_role, record in records.items():
        assert read_chat(record, "here:1").messages[0]["role"] == first_role


def test_the_chat_of_every_format_is_checked(two_formats):
    with pytest.raises(BadChat, match=r"here:1: empty content: message 2 \(user\)") as bad:
        read_chat({"swapped": turns("Hello", " "), "version": 2}, "here:1")
    assert bad.value.fault is Fault.EMPTY


def test_a_record_of_no_format_names_the_keys_of_all(two_formats):
    with pytest.raises(BadChat, match=r'the object needs "messages" or "swapped"\+"version"') as bad:
        read_chat({"swapped": turns("Hello", "Paris.")}, "here:1")
    assert bad.value.fault is Fault.SHAPE


def test_no_format_hides_another():
    """A format whose keys include those of an earlier one would never be tried."""
    assert len({chat_format.name for chat_format in FORMATS}) == len(FORMATS)
    for position, later in enumerate(FORMATS):
        assert not any(earlier.keys <= later.keys for earlier in FORMATS[:position])
