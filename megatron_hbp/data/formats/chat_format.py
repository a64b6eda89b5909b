"""What a chat format is."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_hbp.data.chats import Chat, Record


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """One way to write a chat as a JSON object."""

    name: str
    """As `hbp prepare --help` lists it."""
    keys: frozenset[str]
    """An object that has all of these is of this format."""
    to_chat: Callable[[Record, str], Chat]
    """(record, `file:line`) -> chat, whose roles are mapped to `ROLES`; raises BadChat. `read_chat` checks the rest."""

    def recognises(self, record: Record) -> bool:
        """Tell whether a record is of this format."""
        return self.keys <= record.keys()
