"""What can go wrong at an engine, typed once: transient is worth another attempt, permanent is not.

Adapters turn the exceptions of their library into these at their edge. Nothing else decides
whether anything is tried again.
"""


class StowgateError(Exception):
    """Base of every error that Stowgate raises itself. Its text is meant for an operator."""


class Transient(StowgateError):
    """The same call may succeed later, unchanged."""


class Permanent(StowgateError):
    """The same call fails for as long as nobody changes something."""


class StoreUnavailable(Transient):
    """The object store did not answer, or not in time."""


class StoreFull(Transient):
    """The object store has no room left, or is past its watermark."""


class StoreRefused(Permanent):
    """The object store understood and said no: credentials, permissions, bucket."""


class ObjectMissing(Permanent):
    """There is no object under that key."""


class VersionConflict(Permanent):
    """A conditional write lost: the object exists already, or is no longer the version read."""


class BrokerUnavailable(Transient):
    """The broker is not connected, did not confirm in time, or refused the message."""


class Unroutable(Transient):
    """The broker has no queue for the message; it came back."""


class MalformedEvent(Permanent):
    """An event on our queue is not one of ours."""
