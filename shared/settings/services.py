"""The settings of both API and worker: object store, broker and Workflow Manager."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shared.settings.loader import BadSetting, SettingsSection, setting
from shared.settings.parsers import (
    absolute_path,
    amqp_name,
    broker,
    bucket_name,
    http_url,
    one_of,
    plain_text,
    url,
    visible,
    whole_number,
)

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable with the folder in which prometheus_client adds up the metrics of several processes.
It is here, because prometheus_client reads it on import."""


@dataclass(frozen=True)
class CommonSettings(SettingsSection):
    """The settings that both API and worker read."""

    data: Path = setting(
        "./data",
        absolute_path,
        "folder of the spool, of the `folder` object store, and of the workflow requests with the "
        "`memory` broker",
    )
    object_store: str = setting(
        "folder",
        url("folder", "http://", "https://"),
        "object store: `folder`, or an S3 store as `http(s)://host:port`",
    )
    object_store_credentials: str = setting(
        "static",
        one_of("static", "iam"),
        "source of the S3 keys: `static` uses the three settings below, and reads their files "
        "again when they change; `iam` uses a web identity (`AWS_WEB_IDENTITY_TOKEN_FILE` and "
        "`AWS_ROLE_ARN`), else the credentials of a container "
        "(`AWS_CONTAINER_CREDENTIALS_RELATIVE_URI` or `…_FULL_URI`), else the metadata service of "
        "the instance",
    )
    object_store_access_key: str | None = setting(None, visible, "S3 access key", secret=True)
    object_store_secret_key: str | None = setting(None, plain_text, "S3 secret key", secret=True)
    object_store_session_token: str | None = setting(
        None,
        visible,
        "session token of these keys, if they are temporary",
        secret=True,
    )
    object_store_credentials_url: str | None = setting(
        None,
        http_url,
        "for `iam`: URL of the STS or the metadata service, if it is not AWS's own; for MinIO's "
        "STS the URL of the store",
    )
    object_store_region: str = setting("us-east-1", visible, "S3 region")
    object_store_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the certificate authorities that are trusted for an object store with "
        "`https://`; default: those of the system",
    )
    object_store_client_certificate: Path | None = setting(
        None,
        absolute_path,
        "client certificate for the object store (mutual TLS), a PEM file followed by the "
        "intermediate certificates",
    )
    object_store_client_key: Path | None = setting(
        None, absolute_path, "private key of that certificate, an unencrypted PEM file"
    )
    bucket: str = setting(
        "monaideploy", bucket_name, "bucket of the payloads, shared with the Workflow Manager"
    )
    state_bucket: str = setting(
        "stowgate", bucket_name, "bucket of the records and the VAE registry"
    )
    min_free_bytes: int = setting(
        "67108864",
        whole_number(0),
        "watermark: with less free space on the disk of the spool or of the `folder` store, "
        "uploads are refused with 507 before their body is read",
    )
    broker: str = setting(
        "memory",
        broker,
        "`memory`, or RabbitMQ as `amqp(s)://user:password@host:port/vhost`; for several nodes, "
        "comma-separated URLs, which are tried in random order",
        secret=True,
    )
    broker_password: str | None = setting(
        None,
        plain_text,
        "password to use instead of that in the URL of `STOWGATE_BROKER`; its file is read again "
        "for each new connection",
        secret=True,
    )
    broker_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the certificate authorities that are trusted for RabbitMQ with `amqps://`; "
        "default: those of the system",
    )
    broker_client_certificate: Path | None = setting(
        None,
        absolute_path,
        "client certificate for RabbitMQ (mutual TLS), a PEM file followed by the intermediate "
        "certificates",
    )
    broker_client_key: Path | None = setting(
        None, absolute_path, "private key of that certificate, an unencrypted PEM file"
    )
    broker_confirm_seconds: int = setting(
        "10",
        whole_number(1, 3600),
        "timeout of RabbitMQ's publisher confirms; a message also gets the time that its bytes "
        "take at 1 Mbit/s. `/health/ready` reports an overdue message. The relay repeats an "
        "overdue event; a worker waits for an overdue workflow request until the connection is "
        "lost",
    )
    event_exchange: str = setting(
        "stowgate", amqp_name, "exchange of Stowgate's own events, and prefix of its queues"
    )
    workflow_manager_exchange: str = setting(
        "monaideploy", amqp_name, "topic exchange of the Workflow Manager"
    )
    workflow_manager_routing_key: str = setting(
        "md.workflow.request", amqp_name, "routing key of a workflow request"
    )
    workflow_manager_queue: str = setting(
        "md.workflow.request",
        amqp_name,
        "queue that the Workflow Manager declares; while it is missing, no workflow requests are "
        "sent, and `/health/ready` reports it",
    )
    workflow_manager_dead_letter_exchange: str = setting(
        "monaideploy-dead-letter",
        amqp_name,
        "dead-letter exchange of this queue; Stowgate binds its own queue to it, to receive the "
        "requests that the Workflow Manager refused. While it is missing, `/health/ready` reports "
        "it",
    )
    max_upload_seconds: int = setting(
        "21600",
        whole_number(1, 43200),
        "maximum duration of an upload; above it 408. The objects of a crashed upload are removed "
        "after twice this time",
    )
    lease_seconds: int = setting(
        "60",
        whole_number(2, 3600),
        "lease duration: how long other workers wait before they take over from a crashed one; "
        "also how long an `Idempotency-Key` stays locked after its upload crashed",
    )
    stop_seconds: int = setting(
        "25",
        whole_number(5, 3600),
        "maximum duration of a shutdown, of which uploads in progress get four fifths. It must be "
        "shorter than the grace period before a kill, by default 30 s on Kubernetes and 10 s with "
        "`docker stop`",
    )
    log: str | None = setting(
        None,
        one_of("console", "json"),
        "log format: `console` or `json`; default: `console` on a terminal, else `json`",
    )

    @cached_property
    def spool(self) -> Path:
        return self.data / "spool"

    @property
    def workflow_requests(self) -> Path:
        """The folder of the workflow requests with the `memory` broker."""
        return self.data / "workflow-requests"

    @property
    def payloads_end_seconds(self) -> float:
        """Part of `stop_seconds` for the payloads in progress to end."""
        return 0.4 * self.stop_seconds

    def validate(self) -> None:
        super().validate()
        if (
            self.object_store != "folder"
            and self.object_store_credentials == "static"
            and not (self.object_store_access_key and self.object_store_secret_key)
        ):
            raise BadSetting(
                f"STOWGATE_OBJECT_STORE is {self.object_store!r}, which needs "
                "STOWGATE_OBJECT_STORE_ACCESS_KEY and STOWGATE_OBJECT_STORE_SECRET_KEY"
            )
        for service in ("OBJECT_STORE", "BROKER"):
            names = [f"{service.lower()}_client_{what}" for what in ("certificate", "key")]
            if len({getattr(self, name) is None for name in names}) > 1:
                raise BadSetting(
                    f"STOWGATE_{service}_CLIENT_CERTIFICATE and STOWGATE_{service}_CLIENT_KEY need "
                    "each other, and one is not set"
                )
        if self.bucket == self.state_bucket:
            raise BadSetting(
                f"STOWGATE_STATE_BUCKET is {self.bucket!r}, but must differ from STOWGATE_BUCKET, "
                "which the Workflow Manager reads"
            )
        for variable, bucket in (
            ("STOWGATE_BUCKET", self.bucket),
            ("STOWGATE_STATE_BUCKET", self.state_bucket),
        ):
            reserved = (self.spool, self.workflow_requests)
            if self.object_store == "folder" and self.data / bucket in reserved:
                raise BadSetting(
                    f"{variable} is {bucket!r}, but must be another name: Stowgate uses that "
                    "folder of STOWGATE_DATA for something else"
                )
