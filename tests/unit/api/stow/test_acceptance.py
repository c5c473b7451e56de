"""What a VAE accepts: each rule for itself, and which comes first."""

import re
from dataclasses import replace
from typing import Any

import orjson
import pytest
from instances import new_instance, real_file
from records_made import RECEIVED_AT

from api.stow.acceptance import Refusal, refusal
from api.stow.response import FailureReason
from api.vae.registry import Vae, VaeRegistry
from shared.adapters.folder.store import FolderObjectStore
from shared.dicom.identity import Identity, identify, modality
from shared.dicom.structure import check_structure

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT = "1.2.840.10008.1.2.1"
JPEG_2000 = "1.2.840.10008.1.2.4.90"

CT = Identity(CT_IMAGE, "1.2.3", "1.2", "1.2.1", EXPLICIT)
OPEN = Vae("lung", "LUNG", (), (), RECEIVED_AT)


def _refused(instance_modality: str | None = "CT", **policy: Any) -> Refusal | None:
    return refusal(replace(OPEN, **policy), CT, instance_modality)


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"accepted_sop_classes": (MR_IMAGE, CT_IMAGE)},
        {"accepted_transfer_syntaxes": (EXPLICIT,)},
        {"accepted_modalities": ("MR", "CT")},
    ],
)
def test_what_a_vae_names_or_does_not_limit_is_accepted(policy: dict[str, Any]) -> None:
    assert _refused(**policy) is None


@pytest.mark.parametrize(
    ("policy", "reason", "words"),
    [
        ({"accepted_sop_classes": (MR_IMAGE,)}, 0x0122, f"SOP Class {CT_IMAGE} is none"),
        ({"accepted_transfer_syntaxes": (JPEG_2000,)}, 0xC122, f"syntax {EXPLICIT} is none"),
        ({"accepted_modalities": ("MR",)}, 0xA900, "Modality (0008,0060) is none"),
    ],
)
def test_what_a_vae_does_not_name_is_refused_with_its_reason_and_where_to_look(
    policy: dict[str, Any], reason: int, words: str
) -> None:
    why = _refused(**policy)

    assert why is not None
    assert why.reason == reason
    assert words in why.words
    assert "GET /config/vae/lung" in why.words


def test_an_instance_without_a_legal_modality_is_none_of_those_accepted() -> None:
    why = _refused(None, accepted_modalities=("CT",))

    assert why is not None
    assert why.reason is FailureReason.DATASET_DOES_NOT_MATCH_SOP_CLASS
    assert "no legal Modality" in why.words
    assert _refused(None) is None


def test_the_modality_of_an_instance_is_not_repeated() -> None:
    why = _refused("DOE JANE", accepted_modalities=("CT",))

    assert why is not None
    assert "DOE" not in why.words


def test_the_sop_class_is_told_before_the_transfer_syntax_and_that_before_the_modality() -> None:
    rules: dict[str, Any] = {
        "accepted_modalities": ("MR",),
        "accepted_transfer_syntaxes": (JPEG_2000,),
        "accepted_sop_classes": (MR_IMAGE,),
    }
    reasons = []
    while rules:
        why = _refused(**rules)
        assert why is not None
        reasons.append(why.reason)
        rules.popitem()

    assert reasons == [0x0122, 0xC122, 0xA900]


@pytest.mark.parametrize(
    ("instance", "expected"),
    [
        (real_file(), "CT"),
        (real_file("MR_small_implicit.dcm"), "MR"),
        (real_file("MR_small_bigendian.dcm"), "MR"),
        (real_file("image_dfl.dcm"), "OT"),
        (new_instance(Modality=None), None),
        (new_instance(Modality=""), None),
        (real_file().replace(b"CS\2\0CT", b"CS\2\0ct"), None),
        (real_file().replace(b"CS\2\0CT", b"CS\2\0 \\"), None),
    ],
)
def test_the_modality_is_one_legal_value_or_none(instance: bytes, expected: str | None) -> None:
    structure = check_structure(instance)

    assert modality(structure) == expected
    assert identify(structure)


def test_a_registry_that_was_written_without_policies_is_read(tmp_path: Any) -> None:
    store = FolderObjectStore(tmp_path / "state")
    store.prepare()
    vaes = VaeRegistry(store)
    vaes.add(replace(OPEN, accepted_modalities=("CT",), max_instance_bytes=9))
    (file,) = (tmp_path / "state" / "vae").iterdir()
    (row,) = orjson.loads(file.read_bytes())["vaes"]
    assert vaes.all()["lung"].accepted_modalities == ("CT",)

    older = {k: v for k, v in row.items() if not re.match("accepted|max", k)}
    assert len(older) == len(row) - 2
    file.write_bytes(orjson.dumps({"version": 1, "vaes": [older]}))

    assert vaes.all() == {"lung": OPEN}
