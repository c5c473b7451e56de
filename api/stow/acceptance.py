"""The policy of a Virtual Application Entity (VAE): ordered rules, of which the first match counts.

The size limit is checked while a part arrives, and the rate limit before the body is read.
"""

from typing import NamedTuple

from api.stow.response import FailureReason
from api.vae.registry import Vae
from shared.dicom.identity import Identity


class Refusal(NamedTuple):
    """Why a VAE does not accept an instance."""

    reason: FailureReason
    words: str


def refusal(vae: Vae, identity: Identity, modality: str | None) -> Refusal | None:
    """Return why the VAE does not accept an instance; None if it does.

    `modality` is None if the instance has no valid one. The text contains UIDs and the VAE's name,
    but not the modality, which may be any 16 characters and so patient data.
    """
    if not _accepts(vae.accepted_sop_classes, identity.sop_class_uid):
        return Refusal(
            FailureReason.SOP_CLASS_NOT_SUPPORTED,
            f"its SOP Class {identity.sop_class_uid} {_is_not_accepted_by(vae)}",
        )
    if not _accepts(vae.accepted_transfer_syntaxes, identity.transfer_syntax_uid):
        return Refusal(
            FailureReason.TRANSFER_SYNTAX_NOT_SUPPORTED,
            f"its transfer syntax {identity.transfer_syntax_uid} {_is_not_accepted_by(vae)}",
        )
    if not _accepts(vae.accepted_modalities, modality):
        # PS3.18 Table I.2-2 has no reason for this. 0110 would report a processing failure, which
        # senders retry; A900 reports that the dataset does not fit this destination.
        return Refusal(
            FailureReason.DATASET_DOES_NOT_MATCH_SOP_CLASS,
            f"its Modality (0008,0060) {_is_not_accepted_by(vae)}"
            if modality
            else f"it has no valid Modality (0008,0060), which VAE {vae.name} requires",
        )
    return None


def _accepts(accepted: tuple[str, ...] | None, value: str | None) -> bool:
    return accepted is None or value in accepted


def _is_not_accepted_by(vae: Vae) -> str:
    return f"is not accepted by VAE {vae.name}; GET /config/vae/{vae.name} lists the accepted ones"
