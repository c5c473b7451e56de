"""Senders of a soak: they post studies of mixed size, and try again as real senders do."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import requests
from instances import multipart, new_instance
from ledger import Attempt, Post

VAE, VAE_WORKFLOW = "CHAOS", "chaos-of-vae"
WORKFLOW = "chaos-of-url"

# As dicomweb-client, and 500 besides, which several others try again.
_RETRIED_STATUSES = {408, 429, 500, 503, 504}
_FIRST_WAIT_SECONDS = 0.2
_MAX_WAIT_SECONDS = 4.0
_MAX_ATTEMPTS = 60
_ANSWER_SECONDS = 25.0

# dicomweb-client sends what is larger in chunks.
_CHUNKED_ABOVE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 18

# A UID under 2.25 (PS3.5 B.2) of 39 digits, so that one takes another's place byte for byte.
_UID_MIN, _UID_MAX = 10**38, 2**128 - 1


def _uid(rng: random.Random) -> str:
    return f"2.25.{rng.randint(_UID_MIN, _UID_MAX)}"


class Studies:
    """Studies made of real files; the same seed and number give the same study."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        rng = random.Random(seed)
        self._sop, self._study, self._series = (_uid(rng).encode() for _ in range(3))
        uids = {
            "SOPInstanceUID": self._sop.decode(),
            "StudyInstanceUID": self._study.decode(),
            "SeriesInstanceUID": self._series.decode(),
        }
        self._small = [
            new_instance(name, **uids) for name in ("CT_small.dcm", "CT_small.dcm", "MR_small.dcm")
        ]
        self._large = [
            new_instance("CT_small.dcm", **uids, PixelData=rng.randbytes(size_bytes))
            for size_bytes in (1 << 20, 3 << 20)
        ]

    def make(self, number: int) -> tuple[Post, list[bytes]]:
        rng = random.Random(f"{self._seed}/{number}")
        study, series = _uid(rng), _uid(rng)
        instances = {}
        for template in self._choose(rng):
            sop = _uid(rng)
            instances[sop] = (
                template.replace(self._sop, sop.encode())
                .replace(self._study, study.encode())
                .replace(self._series, series.encode())
            )
        path, workflows, destination = self._target(rng, study)
        post = Post(
            number=number,
            path=path,
            study_uid=study,
            series_uid=series,
            sha256={sop: hashlib.sha256(data).hexdigest() for sop, data in instances.items()},
            workflows=workflows,
            destination=destination,
            key=str(UUID(int=rng.getrandbits(128))) if rng.random() < 0.5 else None,
        )
        return post, list(instances.values())

    def _choose(self, rng: random.Random) -> list[bytes]:
        kind = rng.random()
        if kind < 0.75:
            return rng.choices(self._small, k=rng.choice((1, 1, 2, 3)))
        if kind < 0.94:
            return rng.choices(self._small, k=rng.randint(4, 8))
        if kind < 0.97:
            return rng.choices(self._small, k=rng.randint(9, 40))
        return rng.choices(self._large, k=rng.randint(1, 2))

    def _target(self, rng: random.Random, study: str) -> tuple[str, tuple[str, ...], str]:
        path, workflows, destination = rng.choice(
            (
                ("", (), "default"),
                (f"/{WORKFLOW}", (WORKFLOW,), "default"),
                (f"/vae/{VAE}", (VAE_WORKFLOW,), VAE),
                (f"/vae/{VAE}/{WORKFLOW}", (WORKFLOW,), VAE),
            )
        )
        # The last is not the instances' study: a warning, and 202.
        named = rng.choice(("", "/", f"/{study}", f"/{study}/", f"/{study}", f"/{_uid(rng)}"))
        return f"/dicomweb{path}/studies{named}", workflows, destination


@dataclass
class Senders:
    """`urls` are those of the API's replicas by name, `may_send` waits until the post of that
    number may be sent, and `book` takes each attempt when it has ended."""

    urls: dict[str, str]
    studies: Studies
    posts: int
    seed: int
    may_send: Callable[[int], None]
    book: Callable[[Attempt], None]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self.given_up: list[Post] = []

    def run(self) -> None:
        """One sender, until there is nothing more to send; any number may run."""
        with requests.Session() as session:
            while (number := self._take()) is not None:
                post, instances = self.studies.make(number)
                rng = random.Random(f"{self.seed}/{number}/sending")
                if not self._deliver(session, post, instances, rng):
                    self.given_up.append(post)
                elif post.key is not None and rng.random() < 0.1:
                    # The answer was lost on the way, as far as this sender knows.
                    self._deliver(session, post, instances, rng)

    def _take(self) -> int | None:
        with self._lock:
            if self._next == self.posts:
                return None
            self._next += 1
            return self._next

    def _deliver(
        self, session: requests.Session, post: Post, instances: list[bytes], rng: random.Random
    ) -> bool:
        names = list(self.urls)
        rng.shuffle(names)
        for tried in range(_MAX_ATTEMPTS):
            self.may_send(post.number)
            api = names[tried % len(names)]
            attempt, wait_seconds = self._attempt(session, api, post, instances, rng)
            self.book(attempt)
            if attempt.acknowledged:
                return True
            if wait_seconds is None:
                return False
            longest = min(_MAX_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0**tried)
            time.sleep(max(wait_seconds, longest * rng.uniform(0.5, 1.0)))
        return False

    def _attempt(
        self,
        session: requests.Session,
        api: str,
        post: Post,
        instances: list[bytes],
        rng: random.Random,
    ) -> tuple[Attempt, float | None]:
        """The attempt, and the least pause before the next one; None to give up."""
        # Not of `rng`: attempts would get the ids of those of a run before.
        correlation_id = str(UUID(bytes=random.SystemRandom().randbytes(16)))
        headers = {"X-Correlation-ID": correlation_id}
        if post.key is not None:
            headers["Idempotency-Key"] = post.key
        if len(instances) == 1 and rng.random() < 0.5:
            body, headers["Content-Type"] = instances[0], "application/dicom"
        else:
            body, headers["Content-Type"] = multipart(*instances)
        began = time.time()

        def ended(**found: Any) -> Attempt:
            return Attempt(post, correlation_id, api, began, time.time(), **found)

        try:
            answer = session.post(
                self.urls[api] + post.path,
                data=_chunks(body) if len(body) > _CHUNKED_ABOVE_BYTES else body,
                headers=headers,
                allow_redirects=False,
                timeout=(3.05, _ANSWER_SECONDS),
            )
        except requests.RequestException as error:
            return ended(error=type(error).__name__), 0.0
        attempt = ended(
            status=answer.status_code,
            payload_id=answer.headers.get("X-Payload-ID"),
            stored=_stored(answer),
            answer_sha256=hashlib.sha256(answer.content).hexdigest(),
        )
        if answer.status_code in _RETRIED_STATUSES:
            return attempt, 0.0
        if answer.status_code == 409 and post.key is not None:
            return attempt, float(answer.headers.get("Retry-After", 1))
        return attempt, None


def _chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), _CHUNK_BYTES):
        yield body[start : start + _CHUNK_BYTES]


def _stored(answer: requests.Response) -> frozenset[str]:
    """The SOP Instance UIDs in the Referenced SOP Sequence."""
    if answer.headers.get("Content-Type") != "application/dicom+json":
        return frozenset()
    items: Sequence[dict[str, dict[str, list[str]]]]
    items = json.loads(answer.content).get("00081199", {}).get("Value", [])
    return frozenset(item["00081155"]["Value"][0] for item in items)
