"""The wait for the broker's confirm of a workflow request, under a lease."""

import threading
from collections.abc import Callable

import structlog

from shared.errors import StowgateError, Transient, VersionConflict
from shared.ports import Publication

_log = structlog.get_logger()

# Interval of the lease checks; less than half of the shortest lease.
_POLL_SECONDS = 0.5

# Polls for an outstanding confirm after the worker was told to stop.
_MAX_POLLS_WHILE_STOPPING = 6


def await_confirm(
    publication: Publication,
    stopping: threading.Event,
    keep_lease: Callable[[Publication], None],
) -> None:
    """Wait for the broker's confirm for as long as one may still come.

    Publishing again before that would duplicate the request, with a slow broker on every attempt.
    So a lease that `keep_lease` cannot renew for now is no reason to give up.

    Raises:
        Transient: The worker stops before the confirm.
        VersionConflict: Another worker has the lease.
        StowgateError: As `Publication.wait` raises it.
    """
    polls_left = _MAX_POLLS_WHILE_STOPPING
    while not publication.wait(_POLL_SECONDS):
        polls_left -= stopping.is_set()
        if polls_left == 0:
            raise Transient(
                "a worker stopped before the broker confirmed the request, which may have arrived"
            )
        try:
            keep_lease(publication)
        except VersionConflict:
            raise
        except StowgateError as error:
            _log.warning("lease not renewed; trying again", error=str(error))
