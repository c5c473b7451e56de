"""What a Virtual Application Entity accepts: pure rules, in order; the first that is broken counts.

Its size limit is kept on arrival, as one part's limit, and its rate before the body is read.
"""

from typing import NamedTuple

from api.stow.response import FailureReason
from api.vae.registry import Vae
from shared.dicom.identity import Identity


class Refusal(NamedTuple):
    reason: FailureReason
    words: str


def refusal(vae: Vae, identity: Identity, modality: str | None) -> Refusal | None:
    """Why the VAE does not accept an instance, or None where it does.

    `modality` is None where the instance has none that is legal. The words hold UIDs and the VAE's
    name, and not the modality: any sixteen characters could be in its place.
    """
    if not _accepts(vae.accepted_sop_classes, identity.sop_class_uid):
        return Refusal(
            FailureReason.SOP_CLASS_NOT_SUPPORTED,
            f"its SOP Class {identity.sop_class_uid} {_is_not_one_of(vae)}",
        )
    if not _accepts(vae.accepted_transfer_syntaxes, identity.transfer_syntax_uid):
        return Refusal(
            FailureReason.TRANSFER_SYNTAX_NOT_SUPPORTED,
            f"its transfer syntax {identity.transfer_syntax_uid} {_is_not_one_of(vae)}",
        )
    if not _accepts(vae.accepted_modalities, modality):
        # PS3.18 Table I.2-2 has no reason for this. 0110 would tell of an error of ours, and be
        # tried again; A900 says as well that the data set is not what this place is for.
        return Refusal(
            FailureReason.DATASET_DOES_NOT_MATCH_SOP_CLASS,
            f"its Modality (0008,0060) {_is_not_one_of(vae)}"
            if modality
            else f"it has no legal Modality (0008,0060), and VAE {vae.name} accepts only some",
        )
    return None


def _accepts(accepted: tuple[str, ...] | None, value: str | None) -> bool:
    return accepted is None or value in accepted


def _is_not_one_of(vae: Vae) -> str:
    return f"is none that VAE {vae.name} accepts; GET /config/vae/{vae.name} lists those"
