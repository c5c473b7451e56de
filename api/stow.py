"""The Store transaction over HTTP: parse the request, call the use case, render (PS3.18 10.5)."""

import ipaddress
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from http import HTTPStatus
from threading import BoundedSemaphore
from uuid import uuid4

import structlog
from flask import Blueprint, Request, Response, g, request

from api import store_response
from api.body import RequestBody
from api.ingest import DICOM, Ingest, Receipt, ReceivedPart, Target
from api.multipart import MalformedMultipart, MediaType, parse_media_type, read_parts
from api.problems import BadRequest, TooBusy, UnsupportedMediaType
from shared.dicom.uids import is_uid
from shared.ids import WORKFLOW_ID_RULE, is_guid, is_workflow_id
from shared.metrics import ApiMetrics
from shared.vae import Vae, VaeRegistry

MULTIPART = "multipart/related"

_PIECE_BYTES = 1 << 20

# What is read of a refused body so that its sender gets to see the answer.
_DISCARD_BYTES = 64 << 20
_DISCARD_SECONDS = 5.0


@dataclass(frozen=True)
class StowOptions:
    """`concurrent_uploads` bounds the uploads of this process; the rest are turned away."""

    body_bytes: int
    idle_seconds: float
    concurrent_uploads: int
    public_url: str | None


@dataclass(frozen=True)
class _OnlyPart:
    """A body that is one instance, seen as the only part of a request."""

    body: RequestBody
    media_type: MediaType
    number: int = 1

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.body.read(_PIECE_BYTES), b"")


def stow_blueprint(
    ingest: Ingest, vaes: VaeRegistry, options: StowOptions, metrics: ApiMetrics
) -> Blueprint:
    blueprint = Blueprint("stow", __name__, url_prefix="/dicomweb")
    slots = BoundedSemaphore(options.concurrent_uploads)

    @blueprint.before_request
    def begin() -> None:
        given = request.headers.get("X-Correlation-ID", "")
        g.correlation_id = given.lower() if is_guid(given) else str(uuid4())
        g.started = time.monotonic()
        g.body = None
        structlog.contextvars.bind_contextvars(correlation_id=g.correlation_id)

    @blueprint.after_request
    def end(response: Response) -> Response:
        body: RequestBody | None = g.body
        if body is not None and not body.is_through:
            response.headers["Connection"] = "close"
            # Behind the answer, not before it: a proxy gives up on a peer that takes the body and
            # then hangs up, and tells the sender to try again instead.
            response.call_on_close(lambda: body.discard(_DISCARD_BYTES, _DISCARD_SECONDS))
        response.headers["X-Correlation-ID"] = g.correlation_id
        if response.status_code == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
            response.headers["Accept-Post"] = f"{DICOM}, {MULTIPART}"
        metrics.posts.labels(str(response.status_code)).inc()
        metrics.post_seconds.observe(time.monotonic() - g.started)
        return response

    @blueprint.teardown_request
    def forget(_: BaseException | None) -> None:
        structlog.contextvars.clear_contextvars()

    def store(
        study: str | None = None, workflow: str | None = None, aet: str | None = None
    ) -> Response:
        g.body = _body(request, options)
        target = Target(_checked_study(study), _checked_workflow(workflow), _vae(vaes, aet))
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType("a Content-Encoding other than identity")
        if request.content_length in (None, 0) and not g.body.chunked:
            return Response(status=HTTPStatus.NO_CONTENT)
        if not slots.acquire(blocking=False):
            raise TooBusy(
                f"{options.concurrent_uploads} uploads are in progress, as many as are taken at a "
                "time; send it again later"
            )
        try:
            metrics.uploads.inc()
            receipt = ingest.ingest(
                _parts(request, g.body), target, source_of(request.remote_addr), g.correlation_id
            )
        except MalformedMultipart as error:
            raise BadRequest(f"the multipart body is malformed: {error}") from error
        finally:
            metrics.uploads.dec()
            slots.release()
        if receipt is None:
            return Response(status=HTTPStatus.NO_CONTENT)
        return _render(receipt, options.public_url)

    for form in (
        "/studies",
        "/<path:workflow>/studies",
        "/vae/<aet>/studies",
        "/vae/<aet>/<path:workflow>/studies",
    ):
        blueprint.add_url_rule(form, view_func=store, methods=["POST"])
        blueprint.add_url_rule(f"{form}/<path:study>", view_func=store, methods=["POST"])
    return blueprint


def source_of(address: str | None) -> str:
    """The sender's address in the at most 15 characters that the Workflow Manager takes.

    An IPv6 address that is longer becomes a short form that is the same each time.
    """
    try:
        ip = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return "unknown"
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    text = str(mapped or ip)
    return text if len(text) <= 15 else f"v6-{sha256(ip.packed).hexdigest()[:12]}"


def _body(request: Request, options: StowOptions) -> RequestBody:
    # The server waits for ever for a body that stalls, and holds a thread meanwhile.
    sock = request.environ.get("gunicorn.socket")
    if sock is not None:
        sock.settimeout(options.idle_seconds)
    chunked = "chunked" in request.headers.get("Transfer-Encoding", "").lower()
    length = None if chunked else request.content_length or 0
    return RequestBody(request.environ["wsgi.input"], length, options.body_bytes)


def _checked_study(study: str | None) -> str | None:
    if study is not None and not is_uid(study):
        raise BadRequest(
            "the study in the URL is no UID: at most 64 characters, digits separated by dots"
        )
    return study


def _checked_workflow(workflow: str | None) -> str | None:
    if workflow is not None and not is_workflow_id(workflow):
        raise BadRequest(f"the workflow id in the URL is illegal: {WORKFLOW_ID_RULE}")
    return workflow


def _vae(vaes: VaeRegistry, aet: str | None) -> Vae | None:
    if aet is None:
        return None
    vae = vaes.by_ae_title(aet)
    if vae is None:
        raise BadRequest(
            "there is no Virtual Application Entity with the AE title in the URL; "
            "GET /config/vae lists those there are"
        )
    return vae


def _parts(request: Request, body: RequestBody) -> Iterable[ReceivedPart]:
    media_type = parse_media_type(request.headers.get("Content-Type", ""))
    if media_type.type == DICOM:
        return _only_part(body, media_type)
    if media_type.type != MULTIPART:
        raise UnsupportedMediaType("a Content-Type that is neither DICOM nor multipart/related")
    # Some senders put the part's parameters into this one as well.
    if parse_media_type(media_type.parameters.get("type", DICOM)).type != DICOM:
        raise UnsupportedMediaType("a multipart/related of another type than application/dicom")
    boundary = media_type.parameters.get("boundary")
    if not boundary:
        raise BadRequest("the Content-Type is multipart/related without a boundary parameter")
    return read_parts(body, boundary, _PIECE_BYTES)


def _only_part(body: RequestBody, media_type: MediaType) -> Iterator[ReceivedPart]:
    part = _OnlyPart(body, media_type)
    yield part
    if body.received_bytes == 0:
        raise BadRequest(
            "the chunked body is empty: it was probably lost when the request was "
            "sent again; send it anew"
        )


def _render(receipt: Receipt, public_url: str | None) -> Response:
    dataset = store_response.dataset(
        receipt.stored,
        receipt.failed,
        store_response.retrieve_url(public_url, receipt.stored),
    )
    status = store_response.status(receipt.stored, receipt.failed)
    if _wants_xml(request):
        response = Response(
            store_response.to_xml(dataset), status, content_type=store_response.XML_TYPE
        )
    else:
        response = Response(
            store_response.to_json(dataset), status, content_type=store_response.JSON_TYPE
        )
    if receipt.payload_id is not None:
        response.headers["X-Payload-ID"] = receipt.payload_id
        url = f"{public_url or ''}/payloads/{receipt.payload_id}"
        response.headers["Link"] = f'<{url}>; rel="status"'
    return response


def _wants_xml(request: Request) -> bool:
    """Only a client that names XML and nothing else gets it."""
    accepted = [kind for kind, quality in request.accept_mimetypes if quality > 0]
    return accepted == [store_response.XML_TYPE]
