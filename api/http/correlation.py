"""The correlation id of a request of the Store transaction, and its metrics."""

import time
from http import HTTPStatus
from uuid import uuid4

import structlog
from flask import Flask, Response, g, request

from api.http.media_types import ACCEPTED
from shared.ids import is_guid
from shared.runtime.metrics import ApiMetrics, Steps


def correlate(app: Flask, metrics: ApiMetrics) -> None:
    """Give each request of the Store transaction its correlation id, also one that is refused by
    a hook that is installed after this."""

    @app.before_request
    def begin() -> None:
        if request.blueprint != "stow":
            return
        given = request.headers.get("X-Correlation-ID", "")
        g.correlation_id = given.lower() if is_guid(given) else str(uuid4())
        g.began_at = request.environ.get("stowgate.head_at", time.monotonic())
        g.steps = Steps(metrics.post_step_seconds, g.began_at)
        structlog.contextvars.bind_contextvars(correlation_id=g.correlation_id)
        if request.method == "POST":
            g.steps.done("wait")

    @app.after_request
    def end(response: Response) -> Response:
        if request.blueprint != "stow":
            return response
        response.headers["X-Correlation-ID"] = g.correlation_id
        if response.status_code == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
            response.headers["Accept-Post"] = ", ".join(ACCEPTED)
        if request.method == "POST":
            metrics.posts.labels(str(response.status_code)).inc()
            metrics.post_seconds.observe(time.monotonic() - g.began_at)
            if response.status_code >= HTTPStatus.BAD_REQUEST:
                refusal = g.get("refusal")
                # A dataset has the reason of each instance.
                reason = refusal.reason if refusal else "no_instance_stored"
                metrics.posts_refused.labels(reason).inc()
        return response

    @app.teardown_request
    def forget(_: BaseException | None) -> None:
        structlog.contextvars.clear_contextvars()
