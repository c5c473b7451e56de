"""An answer, which is rendered once, then sent, and kept with an Idempotency-Key."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from api.stow.spool import Spool
from shared.attachments import MAX_INLINE_BYTES

_PIECE_BYTES = 64 << 10


@dataclass(frozen=True)
class Answer:
    """The caller must close `body`."""

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
        """Render `pieces`, with a `heartbeat` after each. Raises what `Spool` raises."""
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
