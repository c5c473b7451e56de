"""The Store transaction over HTTP: parse the request, call the use case, render (PS3.18 10.5)."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from http import HTTPStatus

from flask import Request, Response, g, request

from api.admission.body import RequestBody
from api.admission.concurrency import Admission
from api.admission.rate_limits import RateLimiter
from api.auth import audit
from api.auth.guard import Caller
from api.http.client_address import address_of, sender_of
from api.http.media_types import ACCEPTED, DICOM, MULTIPART
from api.http.problems import (
    BadRequest,
    Forbidden,
    IncompleteBody,
    RateLimited,
    UnknownVae,
    Unprocessable,
    UnsupportedMediaType,
    bare,
)
from api.http.routes import STORE_PATHS, STORE_SERVICE, template
from api.settings import ApiSettings
from api.stow import capabilities
from api.stow import response as store_response
from api.stow.announcements import Announcements
from api.stow.answer import Answer
from api.stow.idempotency import ClaimedKey, Fingerprint, IdempotencyKeys, checked_key
from api.stow.ingest import Ingest, Target
from api.stow.multipart import MalformedMultipart, MediaType, parse_media_type, read_parts
from api.stow.response import Outcome
from api.stow.upload import ReceivedPart, Uploads
from api.vae.registry import Vae, VaeRegistry
from shared import events
from shared.attachments import Attachment
from shared.dicom.uids import is_uid
from shared.ids import WORKFLOW_ID_RULE, is_workflow_id
from shared.record_store import Records

_JSON_TYPES = (store_response.JSON_TYPE, "application/json")

_PIECE_BYTES = 1 << 20

# A client that repeats a request whose body is a generator sends an exhausted generator.
_BODY_LOST = (
    "the chunked body is empty, probably because the client repeated the request without it; send "
    "the complete request again"
)

# The claim of an Idempotency-Key is renewed after each piece, so a slow sender needs small ones.
_KEYED_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class _OnlyPart:
    """A body that is a single instance, as the only part of a request."""

    body: RequestBody
    media_type: MediaType
    piece_bytes: int
    number: int = 1

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.body.read(self.piece_bytes), b"")


class StoreTransaction:
    """Turns a request into its answer."""

    def __init__(
        self,
        *,
        ingest: Ingest,
        uploads: Uploads,
        announcements: Announcements,
        vaes: VaeRegistry,
        records: Records,
        keys: IdempotencyKeys,
        admission: Admission,
        settings: ApiSettings,
    ) -> None:
        self._ingest = ingest
        self._uploads = uploads
        self._announcements = announcements
        self._vaes = vaes
        self._records = records
        self._keys = keys
        self._settings = settings
        self._admission = admission
        self._rates, self._vae_rates = RateLimiter(), RateLimiter()

    def store(
        self, study: str | None = None, workflow: str | None = None, aet: str | None = None
    ) -> Response:
        body = RequestBody.of(
            request,
            limit_bytes=self._settings.max_body_bytes,
            idle_seconds=self._settings.idle_seconds,
            max_seconds=self._settings.max_upload_seconds,
            watchdog=self._admission.watchdog,
        )
        per_minute = self._settings.rate_per_sender
        _count(self._rates, sender_of(request.remote_addr), per_minute, "from this address")
        study, workflow = _checked_study(study), _checked_workflow(workflow)
        _check_codings(request)
        key = checked_key(request.headers.get("Idempotency-Key"))
        vae = self._vaes.cached(aet) if aet else None
        if vae:
            self._admit(vae, workflow)
        _check_length(request)
        is_empty = not request.content_length and not body.chunked
        if is_empty and (vae or aet is None):
            return bare(HTTPStatus.NO_CONTENT)
        with self._admission.limiter.receiving(request.environ.get("gunicorn.socket"), body):
            # Within the slot, as a silent store delays this call.
            if aet is not None and vae is None:
                vae = self._looked_up(aet)
                self._admit(vae, workflow)
            if is_empty:
                return bare(HTTPStatus.NO_CONTENT)
            try:
                return self._receive(body, Target(study, workflow, vae), key)
            except MalformedMultipart as error:
                if body.is_complete and body.received_bytes == 0:
                    raise IncompleteBody(_BODY_LOST) from error
                raise BadRequest(f"the multipart body is malformed: {error}") from error

    def _looked_up(self, aet: str) -> Vae:
        vae = self._vaes.by_ae_title(aet)
        if vae is None:
            raise UnknownVae(
                "there is no Virtual Application Entity with the AE title in the URL; GET "
                "/config/vae lists the existing ones"
            )
        return vae

    def _admit(self, vae: Vae, workflow: str | None) -> None:
        _check_binding(g.caller, vae, workflow)
        limit = vae.max_requests_per_minute
        _count(self._vae_rates, vae.name, limit, f"for VAE {vae.name}")

    def _receive(self, body: RequestBody, target: Target, key: str | None) -> Response:
        claimed: ClaimedKey | None = None
        piece_bytes = _PIECE_BYTES if key is None else _KEYED_PIECE_BYTES
        parts = _parts(request, body, piece_bytes, self._settings.max_part_header_bytes)
        if key is not None:
            caller = g.caller.name or request.remote_addr or ""
            found = self._keys.claim(caller, request.path, key)
            if isinstance(found, str):
                return self._again(found, self._uploads.digests(parts, target.vae))
            claimed = found
        vae_source = target.vae.source if target.vae else None
        g.steps.done("admit")
        receipt = self._ingest.ingest(
            parts,
            target,
            g.caller.source or vae_source or source_of(request.remote_addr),
            g.correlation_id,
            self._rendered,
            claimed,
            g.steps.done,
            caller=g.caller.name,
        )
        if receipt is None:
            return bare(HTTPStatus.NO_CONTENT)
        audit.about(
            payload_id=receipt.payload_id,
            workflow=target.workflow,
            stored=receipt.stored,
            failed=receipt.failed,
            stored_bytes=receipt.stored_bytes,
        )
        answer = receipt.answer
        response = Response(answer.pieces(), answer.status, content_type=answer.content_type)
        response.content_length = answer.body.size_bytes
        response.call_on_close(answer.body.close)
        if receipt.added is not None:
            # After the answer, as the worker that it wakes may use the same cores.
            event = events.of_new_record(receipt.added)
            response.call_on_close(partial(self._announcements.make, event))
        return _with_links(response, receipt.payload_id, self._settings.public_url)

    def _rendered(self, outcome: Outcome, heartbeat: Callable[[], None]) -> Answer:
        content_type, render = store_response.JSON_TYPE, store_response.to_json
        if _wants_xml(request):
            content_type, render = store_response.XML_TYPE, store_response.to_xml
        return Answer.of(
            store_response.status(outcome),
            content_type,
            render(outcome, self._settings.retrieve_url),
            self._settings.spool,
            heartbeat,
        )

    def _again(self, payload_id: str, digests: Iterable[str]) -> Response:
        versioned = self._records.find(payload_id)
        first = versioned.record.first_answer if versioned else None
        if first is None or first.fingerprint != str(Fingerprint(digests)):
            raise Unprocessable(
                "this Idempotency-Key was used with another body; a new request needs a new key"
            )
        audit.about(payload_id=payload_id, answered_before=True)
        body: str | Iterator[bytes] | None = first.body
        if body is None:
            body = self._records.attachments.read(payload_id, Attachment.ANSWER)
        response = Response(body, first.status, content_type=first.content_type)
        response.headers["Idempotent-Replayed"] = "true"
        return _with_links(response, payload_id, self._settings.public_url)


def stow_views(
    transaction: StoreTransaction, public_url: str | None
) -> dict[str, Callable[..., Response]]:
    """Return the views by endpoint."""
    paths = [template(rule).removeprefix(f"{STORE_SERVICE}/") for rule in STORE_PATHS]
    described = capabilities.capabilities(f"{public_url or ''}{STORE_SERVICE}", paths, ACCEPTED)

    def allowed(**_: str) -> Response:
        response = bare(HTTPStatus.NO_CONTENT)
        response.headers["Allow"] = "OPTIONS, POST"
        response.headers["Accept-Post"] = ", ".join(ACCEPTED)
        return response

    def describe() -> Response:
        response = Response(described, content_type=capabilities.CONTENT_TYPE)
        response.headers["Allow"] = "OPTIONS"
        return response

    return {"stow.store": transaction.store, "stow.allowed": allowed, "stow.describe": describe}


def source_of(address: str | None) -> str:
    """Return the sender's address in up to 15 characters, the maximum of the Workflow Manager.

    A longer IPv6 address is replaced by a digest.
    """
    ip = address_of(address)
    if ip is None:
        return "unknown"
    text = str(ip)
    return text if len(text) <= 15 else f"v6-{sha256(ip.packed).hexdigest()[:12]}"


def _count(rates: RateLimiter, name: str, per_minute: int | None, words: str) -> None:
    wait_seconds = rates.take(name, per_minute) if per_minute else 0
    if wait_seconds:
        raise RateLimited(
            f"rate limit exceeded: {per_minute} requests per minute {words}; send it again later",
            math.ceil(wait_seconds),
        )


def _check_codings(request: Request) -> None:
    """Refuse compressed bodies, as a few bytes could inflate to any size."""
    coding = request.headers.get("Content-Encoding", "").strip().lower()
    if coding not in ("", "identity"):
        # RFC 9110 15.5.16: the answer names the accepted coding.
        raise UnsupportedMediaType("a Content-Encoding", {"Accept-Encoding": "identity"})
    transfer_coding = request.headers.get("Transfer-Encoding", "").strip().lower()
    if transfer_coding not in ("", "identity", "chunked"):
        raise UnsupportedMediaType("a Transfer-Encoding other than chunked")


def _check_length(request: Request) -> None:
    """Refuse HTTP/1.0 bodies without a length: they end with the connection (RFC 1945 7.2.2), so a
    truncated one would seem complete."""
    is_old = request.environ["SERVER_PROTOCOL"] == "HTTP/1.0"
    if is_old and request.content_length is None:
        raise BadRequest("a POST with HTTP/1.0 needs a Content-Length")


def _checked_study(study: str | None) -> str | None:
    if study is not None and not is_uid(study):
        raise BadRequest(
            "the Study Instance UID in the URL is not valid: it must have up to 64 characters, "
            "digits separated by dots"
        )
    return study


def _checked_workflow(workflow: str | None) -> str | None:
    if workflow is not None and not is_workflow_id(workflow):
        raise BadRequest(f"the workflow id in the URL is not valid: {WORKFLOW_ID_RULE}")
    return workflow


def _check_binding(caller: Caller, vae: Vae, workflow: str | None) -> None:
    """Check the caller's permission for the workflow, for which the VAE must be known."""
    if workflow and not caller.may_open(vae.virtual_ae_title, workflow, vae.workflows):
        raise Forbidden(
            "the caller lacks permission for the workflow in the URL: it must be a workflow of the "
            "Virtual Application Entity, or one in the caller's bindings"
        )


def _parts(
    request: Request, body: RequestBody, piece_bytes: int, header_bytes: int
) -> Iterable[ReceivedPart]:
    media_type = parse_media_type(request.headers.get("Content-Type", ""))
    if media_type.type == DICOM:
        return _only_part(_OnlyPart(body, media_type, piece_bytes))
    if media_type.type != MULTIPART:
        raise UnsupportedMediaType("a Content-Type that is neither DICOM nor multipart/related")
    # Some senders put the parameters of the part here too.
    if parse_media_type(media_type.parameters.get("type", DICOM)).type != DICOM:
        raise UnsupportedMediaType("a multipart/related of another type than application/dicom")
    boundary = media_type.parameters.get("boundary")
    if not boundary:
        raise BadRequest("the Content-Type is multipart/related without a boundary parameter")
    return read_parts(body, boundary, piece_bytes, header_bytes)


def _only_part(part: _OnlyPart) -> Iterator[ReceivedPart]:
    yield part
    if part.body.received_bytes == 0:
        raise IncompleteBody(_BODY_LOST)


def _with_links(response: Response, payload_id: str | None, public_url: str | None) -> Response:
    if payload_id is not None:
        response.headers["X-Payload-ID"] = payload_id
        response.headers["Link"] = f'<{public_url or ""}/payloads/{payload_id}>; rel="status"'
    return response


def _wants_xml(request: Request) -> bool:
    """Whether the client names XML and prefers it to JSON (RFC 9110 12.5.1)."""
    qualities: dict[str, float] = {}
    for kind, quality in request.accept_mimetypes:
        named = parse_media_type(kind).type
        qualities[named] = max(quality, qualities.get(named, 0))
    any_other = qualities.get("application/*", qualities.get("*/*", 0))
    json = max(qualities.get(kind, any_other) for kind in _JSON_TYPES)
    return qualities.get(store_response.XML_TYPE, 0) > json
