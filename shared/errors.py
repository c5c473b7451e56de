"""What can go wrong at an engine, typed once: transient is worth another attempt, permanent is not.

Adapters turn the exceptions of their library into these at their edge. Nothing else decides
whether a payload is tried again.
"""


class StowgateError(Exception):
    """Base of what goes wrong with an engine, or with what one holds or a sender sent. Its text is
    meant for an operator.

    A request that is refused as a whole is none of these.
    """


class Transient(StowgateError):
    """The same call may succeed later, unchanged."""


class Permanent(StowgateError):
    """The same call fails for as long as nobody changes something."""


class StoreUnavailable(Transient):
    """The object store did not answer in time, or with an error that may pass; or the spool's disk
    has an error."""


class StoreFull(Transient):
    """The object store or the spool's disk has no room left, or is past its watermark."""


class StoreRefused(Permanent):
    """The object store said no: credentials, permissions, bucket."""


class StoreUnfit(Permanent):
    """The object store does not do what Stowgate relies on; nothing may be stored there."""


class ObjectMissing(Permanent):
    """There is no object under that key."""


class VersionConflict(Permanent):
    """A conditional write lost: the object exists already, is gone, or has another version."""


class BrokerUnavailable(Transient):
    """The broker is not connected, refused the message, or did not confirm it in time; then it may
    have arrived all the same."""


class Unroutable(Transient):
    """The broker has no queue for the message; it came back."""


class MessageRefused(Permanent):
    """The broker refuses the message for good, as one that is too large for it."""


class MalformedEvent(Permanent):
    """An event on our queue is not one of ours."""
