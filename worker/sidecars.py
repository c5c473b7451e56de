"""The metadata sidecars of a payload, beside its instances, for the Workflow Manager."""

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from io import BytesIO
from itertools import islice

from shared.dicom.metadata import metadata_json
from shared.dicom.refusal import InstanceRefused
from shared.errors import Permanent, Transient
from shared.instances import StoredInstance
from shared.ports import ObjectStore

_BATCH = 100

# A single instance up to this size is written without a writer thread, which would take longer.
_QUICK_BYTES = 64 << 10

# Interval of `heartbeat` while sidecars are slow; less than half of the shortest lease.
_POLL_SECONDS = 0.5


class InstanceChanged(Permanent):
    """An instance was overwritten after its upload."""


class NoScratch(Transient):
    """The worker's temporary folder has no room to inflate a dataset."""


class Stopping(Transient):
    """The worker is shutting down and leaves the payload to another one."""


class Sidecars:
    """Writes sidecars in the threads of `writers`, which all payloads share, until `stopping` is
    set."""

    def __init__(
        self, store: ObjectStore, writers: ThreadPoolExecutor, stopping: threading.Event
    ) -> None:
        self._store = store
        self._writers = writers
        self._stopping = stopping

    def write(
        self,
        payload_id: str,
        instances: Iterable[StoredInstance],
        count: int,
        heartbeat: Callable[[], None],
        *,
        again: bool,
    ) -> None:
        """Write the missing sidecars of `count` instances, which are iterated once.

        With `again`, or many instances, the existing sidecars are listed first and skipped;
        otherwise all are written. `heartbeat` is called at least every half second, but not for a
        single small instance.

        Raises:
            InstanceChanged, NoScratch, Stopping: see there; also the errors of `heartbeat` and of
                the object store.
        """
        prefix = f"{payload_id}/"
        there = self._written(prefix, heartbeat) if again or count > _BATCH else set()
        missing = (one for one in instances if _name(one.metadata_path) not in there)
        while batch := list(islice(missing, _BATCH)):
            if count == 1 and _is_quick(batch[0]):
                self._write(prefix, batch[0])
            else:
                self._write_batch(prefix, batch, heartbeat)

    def _written(self, prefix: str, heartbeat: Callable[[], None]) -> set[str]:
        """Return the names of the existing sidecars, which are unique within a payload."""
        there = set()
        for number, found in enumerate(self._store.list(prefix)):
            if found.key.endswith(".json"):
                there.add(_name(found.key))
            if number % _BATCH == 0:
                heartbeat()
        return there

    def _write_batch(
        self, prefix: str, batch: Sequence[StoredInstance], heartbeat: Callable[[], None]
    ) -> None:
        writing = [self._writers.submit(self._write, prefix, instance) for instance in batch]
        try:
            for sidecar in writing:
                while not wait([sidecar], timeout=_POLL_SECONDS).done:
                    heartbeat()
                sidecar.result()
                heartbeat()
        finally:
            for sidecar in writing:
                sidecar.cancel()

    def _write(self, prefix: str, instance: StoredInstance) -> None:
        key = prefix + instance.path
        dataset = b"".join(self._read(key, instance))
        try:
            data = metadata_json(dataset, instance.left_out)
        except OSError as error:
            raise NoScratch(
                f"no room to inflate {key} in {tempfile.tempdir or 'the temporary folder'}: "
                f"{error.strerror}; free some space there"
            ) from error
        except InstanceRefused as refused:
            raise InstanceChanged(
                f"{key} is no longer the instance that was stored ({refused}); restore it and "
                "replay the payload, or have the study sent again"
            ) from refused
        self._store.put(
            prefix + instance.metadata_path, BytesIO(data), len(data), "application/json"
        )

    def _read(self, key: str, instance: StoredInstance) -> Iterator[bytes]:
        for start, end in _kept(instance):
            if self._stopping.is_set():
                # With a store that hangs, each further piece would delay the shutdown by seconds.
                raise Stopping("the worker is shutting down")
            yield self._store.read_range(key, start, end - start)


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _kept(instance: StoredInstance) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges that are not left out; for a deflated file, all of it."""
    ranges = () if instance.left_out.is_inflated else instance.left_out.ranges
    start = 0
    for range_start, range_end in (*ranges, (instance.size_bytes, 0)):
        if range_start > start:
            yield start, range_start
        start = range_end


def _is_quick(instance: StoredInstance) -> bool:
    pieces = list(_kept(instance))
    return len(pieces) <= 2 and sum(end - start for start, end in pieces) <= _QUICK_BYTES
