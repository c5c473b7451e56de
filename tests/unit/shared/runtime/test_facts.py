"""What is read for each scrape: settings, disks, and when certificates and keys expire."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from certificates import certificates
from cryptography import x509

from shared.runtime.facts import Facts
from shared.settings.loader import load
from shared.settings.services import CommonSettings

ENDS = datetime(2027, 1, 31, 12, tzinfo=UTC)


class Bench:
    """The facts of a service that has these files."""

    def __init__(self, folder: Path, settings: CommonSettings) -> None:
        self.certificate = folder / "certificate.pem"
        self.keys_end: datetime | None = None
        self._registry = Facts(
            settings,
            lambda: self.keys_end,
            certificates={"api": self.certificate},
            disks={"spool": folder, "gone": folder / "gone"},
        ).registry()

    def value(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"stowgate_{name}", labels)

    def labels(self) -> list[str]:
        return [
            value
            for family in self._registry.collect()
            for sample in family.samples
            for value in sample.labels.values()
        ]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("STOWGATE_DATA", str(tmp_path))
    monkeypatch.setenv("STOWGATE_LEASE_SECONDS", "90")
    monkeypatch.setenv("STOWGATE_OBJECT_STORE_SECRET_KEY", "12345678")
    return Bench(tmp_path, load(CommonSettings))


def test_the_expiry_is_that_of_the_certificate_in_the_file_now(
    bench: Bench, tmp_path: Path
) -> None:
    name = "certificate_expiry_timestamp_seconds"
    assert bench.value(name, certificate="api") is None

    for folder in ("first", "second"):
        made = certificates(tmp_path / folder).certificate
        shutil.copy(made, bench.certificate)
        ends = x509.load_pem_x509_certificate(made.read_bytes()).not_valid_after_utc
        assert bench.value(name, certificate="api") == ends.timestamp()

    bench.certificate.write_bytes(b"no PEM")
    assert bench.value(name, certificate="api") is None


def test_the_expiry_of_temporary_keys_is_exported_and_that_of_others_is_not(bench: Bench) -> None:
    name = "object_store_keys_expiry_timestamp_seconds"
    assert bench.value(name) is None

    bench.keys_end = ENDS

    assert bench.value(name) == ENDS.timestamp()


def test_settings_that_are_numbers_are_exported_and_secrets_are_not(bench: Bench) -> None:
    assert bench.value("setting", variable="STOWGATE_LEASE_SECONDS") == 90
    assert "STOWGATE_OBJECT_STORE_SECRET_KEY" not in bench.labels()


def test_a_disk_that_cannot_be_examined_is_left_out(bench: Bench) -> None:
    assert (bench.value("disk_free_bytes", disk="spool") or 0) > 0
    assert bench.value("disk_watermark_bytes", disk="spool") == 64 << 20
    assert bench.value("disk_free_bytes", disk="object_store") is not None
    assert bench.value("disk_free_bytes", disk="gone") is None
    assert bench.value("disk_watermark_bytes", disk="gone") is None
