"""Reasons to refuse an instance: the errors of the structure check and of `identify`."""

from typing import ClassVar

from shared.errors import StowgateError


class InstanceRefused(StowgateError):
    """Report why one part is not stored. The message contains no value of the data set.

    The two SOP UIDs name the instance in the Failed SOP Sequence (PS3.18 10.5.3). They are set when
    both are known and valid, and otherwise both None.
    """

    failure_reason: ClassVar[int]
    """PS3.18 Table I.2-2."""

    def __init__(
        self,
        message: str,
        sop_class_uid: str | None = None,
        sop_instance_uid: str | None = None,
    ) -> None:
        super().__init__(message)
        self.sop_class_uid = sop_class_uid
        self.sop_instance_uid = sop_instance_uid


class NotUnderstood(InstanceRefused):
    """The file is not Part 10, truncated, malformed, or nested too deeply."""

    failure_reason = 0xC000


class CheckLimitExceeded(InstanceRefused):
    """The file is valid as far as it was read, but exceeds a limit on time or memory."""

    failure_reason = 0xA700


class TransferSyntaxNotSupported(InstanceRefused):
    """The transfer syntax is not in PS3.6 Table A-1."""

    failure_reason = 0xC122


class AttributesMissing(InstanceRefused):
    """An attribute that every composite instance has is missing."""

    failure_reason = 0xA900
