"""The policy of a VAE: each rule, and their order."""

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
def test_listed_values_and_unlimited_fields_are_accepted(policy: dict[str, Any]) -> None:
    assert _refused(**policy) is None


@pytest.mark.parametrize(
    ("policy", "reason", "words"),
    [
        ({"accepted_sop_classes": (MR_IMAGE,)}, 0x0122, f"SOP Class {CT_IMAGE} is not accepted"),
        (
            {"accepted_transfer_syntaxes": (JPEG_2000,)},
            0xC122,
            f"syntax {EXPLICIT} is not accepted",
        ),
        ({"accepted_modalities": ("MR",)}, 0xA900, "Modality (0008,0060) is not accepted"),
    ],
)
def test_an_unlisted_value_fails_with_its_reason_and_the_url_of_the_vae(
    policy: dict[str, Any], reason: int, words: str
) -> None:
    why = _refused(**policy)

    assert why is not None
    assert why.reason == reason
    assert words in why.words
    assert "GET /config/vae/lung" in why.words


def test_an_instance_without_a_valid_modality_fails_if_modalities_are_limited() -> None:
    why = _refused(None, accepted_modalities=("CT",))

    assert why is not None
    assert why.reason is FailureReason.DATASET_DOES_NOT_MATCH_SOP_CLASS
    assert "no valid Modality" in why.words
    assert _refused(None) is None


def test_the_error_does_not_repeat_the_modality() -> None:
    why = _refused("DOE JANE", accepted_modalities=("CT",))

    assert why is not None
    assert "DOE" not in why.words


def test_the_order_is_sop_class_then_transfer_syntax_then_modality() -> None:
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
def test_the_modality_is_one_valid_value_or_none(instance: bytes, expected: str | None) -> None:
    structure = check_structure(instance)

    assert modality(structure) == expected
    assert identify(structure)


def test_a_registry_written_without_policies_can_be_read(tmp_path: Any) -> None:
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
