"""Health and metrics over HTTP, the same for the API and the worker."""

from collections.abc import Mapping
from http import HTTPStatus

from flask import Blueprint, Response
from flask.typing import ResponseReturnValue
from prometheus_client import CollectorRegistry

from shared.engines import Dependency
from shared.errors import StowgateError
from shared.metrics import CONTENT_TYPE, exposition


def health_blueprint(
    dependencies: Mapping[str, Dependency], registry: CollectorRegistry
) -> Blueprint:
    blueprint = Blueprint("health", __name__)

    @blueprint.get("/health/live")
    def live() -> ResponseReturnValue:
        return {"status": "live"}

    @blueprint.get("/health/ready")
    def ready() -> ResponseReturnValue:
        states = {name: _state(dependency) for name, dependency in dependencies.items()}
        down = [name for name, state in states.items() if state["status"] == "down"]
        unready = any(dependencies[name].essential for name in down)
        status = "unready" if unready else "degraded" if down else "ready"
        return (
            {"status": status, "dependencies": states},
            HTTPStatus.SERVICE_UNAVAILABLE if unready else HTTPStatus.OK,
        )

    @blueprint.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(registry), content_type=CONTENT_TYPE)

    return blueprint


def _state(dependency: Dependency) -> dict[str, str]:
    try:
        dependency.ping()
    except StowgateError as error:
        return {"status": "down", "detail": str(error)}
    return {"status": "up"}
