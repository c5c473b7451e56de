"""Who is next where uploads wait for their turn."""

import threading
from contextlib import ExitStack
from itertools import count

from prometheus_client import CollectorRegistry
from service import wait_for

from api.slots import Slots
from shared.metrics import ApiMetrics

PATIENCE_SECONDS = 100.0


class Upload:
    was_cut = False

    def stalled_seconds(self) -> float:
        return 0.0

    def cut(self) -> None:
        self.was_cut = True


class GivesWay(Upload):
    """At once to whoever asks, but to that one thread only when it has asked some more times."""

    def __init__(self) -> None:
        self.late_for: threading.Thread | None = None
        self._asked = count()

    def stalled_seconds(self) -> float:
        late = threading.current_thread() is self.late_for and next(self._asked) < 4
        return 0.0 if self.late_for is None or late else PATIENCE_SECONDS


def test_who_came_first_gets_the_room_although_another_could_have_seen_it_sooner() -> None:
    registry = CollectorRegistry()
    slots = Slots(
        1,
        2,
        wait_seconds=60,
        patience_seconds=PATIENCE_SECONDS,
        metrics=ApiMetrics(registry),
    )
    stalled, turns = GivesWay(), list[str]()

    def upload(name: str) -> None:
        with slots.taken(Upload()):
            turns.append(name)

    first, second = (
        threading.Thread(target=upload, args=[name], daemon=True) for name in ("first", "second")
    )
    with ExitStack() as holding:
        holding.enter_context(slots.taken(stalled))
        first.start()
        wait_for(lambda: registry.get_sample_value("stowgate_uploads_waiting") == 1)
        stalled.late_for = first
        second.start()
        for thread in (first, second):
            thread.join(60)

    assert turns == ["first", "second"]
    assert stalled.was_cut
