"""The settings that the API and the worker share: the services they stand on."""

from dataclasses import dataclass
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
"""Where prometheus_client keeps its counts when several processes serve as one. It looks on import,
so this is not declared beside it."""


@dataclass(frozen=True)
class CommonSettings(SettingsSection):
    """What the API and the worker both read."""

    data: Path = setting(
        "./data",
        absolute_path,
        "folder of the spool, of the embedded store, and with the `memory` broker of the workflow "
        "requests",
    )
    object_store: str = setting(
        "folder",
        url("folder", "http://", "https://"),
        "`folder`, or an S3 store as `http(s)://host:port`",
    )
    object_store_credentials: str = setting(
        "static",
        one_of("static", "iam"),
        "where the keys come from: `static` is the three settings below, whose files are read "
        "again when they change; `iam` a web identity (`AWS_WEB_IDENTITY_TOKEN_FILE` and "
        "`AWS_ROLE_ARN`), else a container (`AWS_CONTAINER_CREDENTIALS_RELATIVE_URI` or "
        "`…_FULL_URI`), else the metadata service of the instance",
    )
    object_store_access_key: str | None = setting(None, visible, "S3 access key", secret=True)
    object_store_secret_key: str | None = setting(None, plain_text, "S3 secret key", secret=True)
    object_store_session_token: str | None = setting(
        None,
        visible,
        "session token that belongs to these keys, where they are temporary",
        secret=True,
    )
    object_store_credentials_url: str | None = setting(
        None,
        http_url,
        "for `iam`: the STS or the metadata service, in place of AWS's own; for MinIO's STS the "
        "URL of the store",
    )
    object_store_region: str = setting("us-east-1", visible, "S3 region")
    object_store_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the authorities that the certificate of the object store may come from, with "
        "`https://`; by default those that the system trusts",
    )
    object_store_client_certificate: Path | None = setting(
        None,
        absolute_path,
        "certificate that the object store is shown (mutual TLS), a PEM file with the intermediate "
        "ones behind it",
    )
    object_store_client_key: Path | None = setting(
        None, absolute_path, "private key of that certificate, a PEM file that is not encrypted"
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
        "watermark: below this much free disk, the spool's or the folder store's, uploads are "
        "refused with 507 before their body",
    )
    broker: str = setting(
        "memory",
        broker,
        "`memory`, or RabbitMQ as `amqp(s)://user:password@host:port/vhost`; for several nodes, "
        "such URLs with commas between, which are tried in random order",
        secret=True,
    )
    broker_password: str | None = setting(
        None,
        plain_text,
        "password in place of that in the URL of `STOWGATE_BROKER`; its file is read again for "
        "each new connection",
        secret=True,
    )
    broker_ca: Path | None = setting(
        None,
        absolute_path,
        "PEM file of the authorities that the certificate of RabbitMQ may come from, with "
        "`amqps://`; by default those that the system trusts",
    )
    broker_client_certificate: Path | None = setting(
        None,
        absolute_path,
        "certificate that RabbitMQ is shown (mutual TLS), a PEM file with the intermediate ones "
        "behind it",
    )
    broker_client_key: Path | None = setting(
        None, absolute_path, "private key of that certificate, a PEM file that is not encrypted"
    )
    broker_confirm_seconds: int = setting(
        "10",
        whole_number(1, 3600),
        "how long RabbitMQ may take to confirm a message, beside the time that its bytes take at "
        "1 Mbit/s. An announcement that is overdue is left to the relay; a workflow request is "
        "waited for as long as the connection lives, and shown by `/health/ready`",
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
        "queue that the Workflow Manager declares: while it is missing, requests are held, and "
        "`/health/ready` says so",
    )
    workflow_manager_dead_letter_exchange: str = setting(
        "monaideploy-dead-letter",
        amqp_name,
        "exchange that this queue dead-letters to; Stowgate binds a queue of its own there and so "
        "learns which requests the Workflow Manager refused. While it is missing, `/health/ready` "
        "reports it",
    )
    max_upload_seconds: int = setting(
        "21600",
        whole_number(1, 43200),
        "longest upload; above it 408. What an upload that died leaves is swept after twice this "
        "time",
    )
    lease_seconds: int = setting(
        "60",
        whole_number(2, 3600),
        "how long a worker, or an upload with an `Idempotency-Key`, keeps others waiting when it "
        "dies",
    )
    stop_seconds: int = setting(
        "25",
        whole_number(5, 3600),
        "how long a stop may take, of which uploads under way have four fifths to end; less than "
        "what kills the process then waits: 30 s on Kubernetes, 10 s with `docker stop`",
    )
    log: str | None = setting(
        None,
        one_of("console", "json"),
        "`console` or `json`; by default `console` on a terminal, else `json`",
    )

    @property
    def spool(self) -> Path:
        return self.data / "spool"

    @property
    def workflow_requests(self) -> Path:
        """Where they are written with the `memory` broker."""
        return self.data / "workflow-requests"

    @property
    def hand_back_seconds(self) -> float:
        """Of a stop, what a worker has for the payloads that it has in hand."""
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
                f"STOWGATE_STATE_BUCKET is {self.bucket!r}, but must be another bucket than "
                "STOWGATE_BUCKET: the Workflow Manager reads that one"
            )
        for variable, bucket in (
            ("STOWGATE_BUCKET", self.bucket),
            ("STOWGATE_STATE_BUCKET", self.state_bucket),
        ):
            reserved = (self.spool, self.workflow_requests)
            if self.object_store == "folder" and self.data / bucket in reserved:
                raise BadSetting(
                    f"{variable} is {bucket!r}, but must be another name: that folder of "
                    "STOWGATE_DATA is for something else"
                )
