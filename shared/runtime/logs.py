"""Logs by structlog, which also renders the libraries' log lines.

Tracebacks are rendered without local variables, which may contain a dataset.
"""

import logging
import sys
import traceback
from importlib.metadata import version
from typing import Any

import structlog


def configure_logs(form: str | None, level: int = logging.INFO) -> None:
    """`form` is `console`, `json`, or None for `console` on a terminal and `json` elsewhere."""
    form = form or ("console" if sys.stderr.isatty() else "json")
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Any] = (
        [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
        if form == "console"
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    # The adapters report the errors of these in one line; pydicom's lines may quote values.
    for name in ("opentelemetry.exporter", "pika", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("pydicom").disabled = True


def log_start() -> None:
    """Log the version, once the settings and the address are known to be good: a bad one stops the
    start with one line."""
    structlog.get_logger().info("starting", version=version("stowgate"))


def where(error: BaseException) -> str:
    """Return file and line of an unexpected error. Its text must not be logged, as it may contain a
    value of a dataset."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{place.filename}:{place.lineno}"
