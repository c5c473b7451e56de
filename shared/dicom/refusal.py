"""Why an instance is not stored: the errors of the structure check and of reading the identity."""

from typing import ClassVar

from shared.errors import StowgateError


class InstanceRefused(StowgateError):
    """One part that is not stored. Its text says why, without values of the data set.

    The two SOP UIDs are set when both are known and legal, so that the sender can be told which
    instance is meant (PS3.18 10.5.3: Failed SOP Sequence), and otherwise both None.
    """

    failure_reason: ClassVar[int]
    """PS3.18 Table I.2-2."""

    def __init__(
        self,
        words: str,
        sop_class_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> None:
        super().__init__(words)
        self.sop_class_uid = sop_class_uid
        self.sop_instance_uid = sop_instance_uid


class NotUnderstood(InstanceRefused):
    """Not Part 10, truncated, malformed, or nested too deep."""

    failure_reason = 0xC000


class TooMuchToCheck(InstanceRefused):
    """Understood as far as it was read, but over a limit on time or memory."""

    failure_reason = 0xA700


class TransferSyntaxNotAccepted(InstanceRefused):
    """Not a transfer syntax of PS3.6 Table A-1."""

    failure_reason = 0xC122


class AttributesMissing(InstanceRefused):
    """An attribute that every instance has is not there."""

    failure_reason = 0xA900
