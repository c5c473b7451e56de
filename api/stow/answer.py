"""An answer that was rendered once, to be sent and to be remembered."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from api.stow.spool import Spool
from shared.attachments import MAX_INLINE_BYTES

_PIECE_BYTES = 64 << 10


@dataclass(frozen=True)
class Answer:
    """`body` is the caller's to close."""

    status: int
    content_type: str
    body: Spool

    @classmethod
    def of(
        cls,
        status: int,
        content_type: str,
        pieces: Iterable[bytes],
        spool_folder: Path,
        heartbeat: Callable[[], None],
    ) -> "Answer":
        """Render `pieces`, with a `heartbeat` between them. Raises what `Spool` raises."""
        answer = cls(status, content_type, Spool(spool_folder, MAX_INLINE_BYTES))
        try:
            for piece in pieces:
                answer.body.write(piece)
                heartbeat()
        except BaseException:
            answer.body.close()
            raise
        return answer

    def pieces(self) -> Iterator[bytes]:
        return iter(partial(self.body.open().read, _PIECE_BYTES), b"")
