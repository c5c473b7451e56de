"""Errors of the object store and the broker. Transient ones are retried, permanent ones are not.

Adapters translate the exceptions of their libraries into these. Nothing else decides whether a
payload is tried again.
"""


class StowgateError(Exception):
    """Base of errors of the object store, of the broker, and of stored or sent data. The text is
    meant for an operator.

    A refused HTTP request is a `Problem` instead.
    """


class Transient(StowgateError):
    """The same call may succeed later, unchanged."""


class Permanent(StowgateError):
    """The same call fails until somebody fixes the cause."""


class StoreUnavailable(Transient):
    """The object store timed out or failed temporarily, or the spool's disk failed."""


class StoreFull(Transient):
    """The object store or the spool's disk is full, or past its watermark."""


class StoreRefused(Permanent):
    """The object store refused the request: credentials, permissions, bucket."""


class StoreUnfit(Permanent):
    """The object store lacks what Stowgate relies on; nothing may be stored there."""


class ObjectMissing(Permanent):
    """The key does not exist."""


class VersionConflict(Permanent):
    """A conditional write failed: the object exists already, is gone, or has another version."""


class BrokerUnavailable(Transient):
    """The broker is not connected, refused the message, or did not confirm it in time; the message
    may still have arrived."""


class Unroutable(Transient):
    """The broker has no queue for the message and returned it."""


class MessageRefused(Permanent):
    """The broker permanently refuses the message, for example because it is too large."""


class MalformedEvent(Permanent):
    """A message on the event queue is not a valid event."""
