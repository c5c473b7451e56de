"""Metrics that are not counted, but read for each scrape: versions, settings, disks, expiry."""

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from cryptography import x509
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from shared.runtime.disk import free_bytes
from shared.settings.loader import numbers
from shared.settings.services import CommonSettings


@dataclass(frozen=True, eq=False)
class Facts(Collector):
    """What every process of a service reads alike.

    Args:
        settings: Of this service.
        keys_end: When the temporary keys of the object store expire; None if they do not.
        certificates: Further files with a certificate, by the label.
        disks: Further folders whose disk is watched, by the label.
        max_uploads: The maximum concurrent uploads, for the API.
    """

    settings: CommonSettings
    keys_end: Callable[[], datetime | None]
    certificates: Mapping[str, Path | None] = field(default_factory=dict)
    disks: Mapping[str, Path] = field(default_factory=dict)
    max_uploads: int | None = None

    def registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(self)
        return registry

    def collect(self) -> Iterable[Metric]:
        yield InfoMetricFamily(
            "stowgate_build",
            "release of Stowgate, and version of Python",
            {"version": version("stowgate"), "python": platform.python_version()},
        )
        yield from self._settings()
        yield from self._disks()
        yield from self._expiries()

    def _settings(self) -> Iterable[Metric]:
        settings = GaugeMetricFamily(
            "stowgate_setting", "value of a setting that is a number", labels=["variable"]
        )
        for variable, value in numbers(self.settings):
            settings.add_metric([variable], value)
        yield settings
        if self.max_uploads is not None:
            yield GaugeMetricFamily(
                "stowgate_max_uploads",
                "maximum concurrent uploads of all processes of this API",
                self.max_uploads,
            )

    def _disks(self) -> Iterable[Metric]:
        disks = dict(self.disks)
        if self.settings.object_store == "folder":
            disks["object_store"] = self.settings.data
        free = GaugeMetricFamily(
            "stowgate_disk_free_bytes", "free space on a disk", labels=["disk"]
        )
        watermark = GaugeMetricFamily(
            "stowgate_disk_watermark_bytes",
            "with less free space on that disk, uploads are refused",
            labels=["disk"],
        )
        for disk, folder in disks.items():
            try:
                free.add_metric([disk], free_bytes(folder))
            except OSError:
                continue  # `/health/ready` reports it
            watermark.add_metric([disk], self.settings.min_free_bytes)
        yield from (free, watermark)

    def _expiries(self) -> Iterable[Metric]:
        certificates = GaugeMetricFamily(
            "stowgate_certificate_expiry_timestamp_seconds",
            "when a certificate expires",
            labels=["certificate"],
        )
        files = {
            **self.certificates,
            "object_store_client": self.settings.object_store_client_certificate,
            "broker_client": self.settings.broker_client_certificate,
        }
        for certificate, path in files.items():
            expiry = None if path is None else _expiry(path)
            if expiry is not None:
                certificates.add_metric([certificate], expiry.timestamp())
        yield certificates
        keys_end = self.keys_end()
        if keys_end is not None:
            yield GaugeMetricFamily(
                "stowgate_object_store_keys_expiry_timestamp_seconds",
                "when the temporary keys of the object store expire",
                keys_end.timestamp(),
            )


def _expiry(path: Path) -> datetime | None:
    """Return the end of the first certificate in a PEM file; None if there is none to be read."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None
