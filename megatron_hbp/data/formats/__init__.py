"""Chat formats: decoded JSON objects to chats.

To add a format, write a module that defines its `FORMAT`, and list that in `FORMATS`.
"""

from megatron_hbp.data.chats import BadChat, Chat, Fault, Record, check_chat
from megatron_hbp.data.formats import messages
from megatron_hbp.data.formats.chat_format import ChatFormat

FORMATS: tuple[ChatFormat, ...] = (messages.FORMAT,)
"""In the order in which they are tried: the first that recognises a record reads it."""


def read_chat(record: Record, where: str) -> Chat:
    """Convert a record by the first format that recognises it, and check the chat; raises BadChat."""
    for chat_format in FORMATS:
        if chat_format.recognises(record):
            chat = chat_format.to_chat(record, where)
            check_chat(chat)
            return chat
    known = " or ".join("+".join(f'"{key}"' for key in sorted(chat_format.keys)) for chat_format in FORMATS)
    raise BadChat(where, Fault.SHAPE, f"the object needs {known}")
