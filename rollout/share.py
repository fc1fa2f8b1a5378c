"""Which of several server processes holds a session: decided by its id alone, the same at every start."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b


def place(session_id: str, count: int) -> int:
    """The number, 0..count-1, of the process that holds a session."""
    digest = blake2b(session_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One process's part of all sessions.

    Attributes:
        index: of this process, 0..count-1.
        count: processes behind the port.

    Raises:
        ValueError: no such process.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"expected 0 <= index < count, got process {self.index} of {self.count}")

    def holds(self, session_id: str) -> bool:
        """Whether the session lives in this process."""
        return self.count == 1 or place(session_id, self.count) == self.index


WHOLE = Share()
"""The only process."""
