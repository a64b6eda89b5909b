"""The format of chat-completion APIs: `{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}`."""

from megatron_hbp.data.chats import BadChat, Chat, Fault, Record, json_type, object_list
from megatron_hbp.data.formats.chat_format import ChatFormat


def to_chat(record: Record, where: str) -> Chat:
    """Take messages and tools as they are; raises BadChat."""
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadChat(where, Fault.SHAPE, f'"tools" is {json_type(tools)}, not a list')
    return Chat(where=where, messages=object_list(record, "messages", where), tools=tools)


FORMAT = ChatFormat(name="messages", keys=frozenset({"messages"}), to_chat=to_chat)
