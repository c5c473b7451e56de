"""The chaos soak: senders post while API, workers, broker and object store are killed, frozen and
restarted at random; then everything that was promised is held against what is there.

It brings its own engines, and ends with 0 when nothing was lost, doubled or changed, with 1 when
something was, and with 2 where the engines cannot be had.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import requests
from engines import NotToBeHad, ObjectStoreEndpoint, object_store_client
from killable import (
    NOT_SERVING,
    Part,
    broker,
    dead_letter_at_least_once,
    object_store,
    stowgate,
)
from ledger import Attempt, Finding, Ledger, Request, orphans
from minio import Minio
from minio.error import MinioException
from senders import VAE, VAE_WORKFLOW, Senders, Studies
from urllib3.exceptions import HTTPError
from workflow_requests import QUEUE, WorkflowRequests

API, WORKER, BROKER, OBJECT_STORE = "api", "worker", "broker", "object store"
KINDS = (API, WORKER, BROKER, OBJECT_STORE)
KILL, FREEZE, RESTART = "kill", "freeze", "restart"
ACTIONS = (KILL, FREEZE, RESTART)

BUCKET, STATE_BUCKET = "monaideploy", "stowgate"

_PROGRESS_SECONDS = 5.0
# Longer than the longest pause between two attempts of a worker.
_SETTLE_SECONDS = 150.0
_PAGE = 200
_CASES_SHOWN = 10
# For so long nothing must be refused any more; a dead letter may wait for a worker.
_QUIET_SECONDS = 5.0

_FACT = re.compile(r"[0-9a-f]{12}\.([0-9a-f-]{36})/([0-9]+)\.json")


@dataclass(frozen=True)
class Options:
    posts: int
    seed: int
    senders: int
    posts_per_blow: int
    lease_seconds: int
    max_upload_seconds: int
    sweep_seconds: int
    refused_share: float

    @property
    def sweep_grace_seconds(self) -> float:
        return 2.0 * self.max_upload_seconds


@dataclass(frozen=True)
class Hit:
    """What happens to one part: down or frozen for `seconds`, then started or thawed."""

    part: str
    action: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.action} {self.part} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class Blow:
    """Hits that come at once, when the post of that number begins."""

    at_post: int
    hits: tuple[Hit, ...]


def schedule(options: Options, parts: Sequence[Part]) -> list[Blow]:
    """The same for the same options. Begins with a kill of each kind."""
    rng = random.Random(f"{options.seed}/schedule")
    hits = _hits(options, parts, rng)
    blows = []
    for at_post in range(options.posts_per_blow // 2, options.posts, options.posts_per_blow):
        first = next(hits)
        second = next(hits) if rng.random() < 0.25 else first
        at_once = (first,) if second.part == first.part else (first, second)
        blows.append(Blow(at_post, at_once))
    return blows


def _hits(options: Options, parts: Sequence[Part], rng: random.Random) -> Iterator[Hit]:
    kills = [(kind, KILL) for kind in KINDS]
    others = [(kind, action) for kind in KINDS for action in (FREEZE, RESTART)]
    rng.shuffle(kills)
    rng.shuffle(others)
    deck = [*kills, *others]
    while True:
        for kind, action in deck:
            part = rng.choice([part for part in parts if part.kind == kind])
            yield Hit(part.name, action, _seconds(options, kind, action, rng))
        deck = [*kills, *others, (API, KILL), (WORKER, KILL)]
        rng.shuffle(deck)


def _seconds(options: Options, kind: str, action: str, rng: random.Random) -> float:
    if action != FREEZE:
        return rng.uniform(0.0, 2.5)
    # Now and then for longer than somebody waits: the sweeper for an upload, other workers for
    # the one that has a lease, a connection for anything from the broker, the API for the object
    # store's answer.
    patience_seconds = {
        API: options.sweep_grace_seconds,
        WORKER: options.lease_seconds,
        BROKER: 10.0,
        OBJECT_STORE: 9.0,
    }
    if rng.random() < 0.25:
        return patience_seconds[kind] + rng.uniform(1.0, 4.0)
    return rng.uniform(0.5, 3.0)


class Aborted(Exception):
    """The soak is over before its time."""


class Gate:
    """Keeps the senders and the chaos in step, by the numbers of the posts."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._open_to = 0
        self._aborted = False

    def may_send(self, number: int) -> None:
        """Wait until that post may begin. Raises `Aborted`."""
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or number <= self._open_to)
            if self._aborted:
                raise Aborted
            self._begun = max(self._begun, number)
            self._changed.notify_all()

    def open_to(self, number: int) -> None:
        with self._changed:
            self._open_to = number
            self._changed.notify_all()

    def until_begun(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or self._begun >= number)
            if self._aborted:
                raise Aborted

    def abort(self) -> None:
        with self._changed:
            self._aborted = True
            self._changed.notify_all()


@dataclass
class Recovery:
    """`revived_at` is when the part was started again or thawed; seconds of the epoch."""

    kind: str
    part: str
    action: str
    revived_at: float
    ready_seconds: float | None = None
    first_success_seconds: float | None = None


@dataclass
class Chaos:
    parts: Mapping[str, Part]
    say: Callable[[str], None]
    recoveries: list[Recovery] = field(default_factory=list)
    stop_seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, blows: Sequence[Blow], gate: Gate, posts: int) -> None:
        for number, blow in enumerate(blows, start=1):
            last = number == len(blows)
            # The load goes on while this blow is dealt with, up to where the next one is due.
            gate.open_to(posts if last else blows[number].at_post)
            gate.until_begun(blow.at_post)
            self.say(f"blow {number}/{len(blows)}: {', '.join(map(str, blow.hits))}")
            self._strike(blow)
        gate.open_to(posts)

    def _strike(self, blow: Blow) -> None:
        for hit in blow.hits:
            body = self.parts[hit.part].body
            if hit.action == KILL:
                body.kill()
            elif hit.action == FREEZE:
                body.freeze()
            else:
                began = time.monotonic()
                body.terminate()
                stops = self.stop_seconds.setdefault(self.parts[hit.part].kind, [])
                stops.append(time.monotonic() - began)
        down_seconds = 0.0
        revived = []
        for hit in sorted(blow.hits, key=lambda hit: hit.seconds):
            time.sleep(hit.seconds - down_seconds)
            down_seconds = hit.seconds
            revived.append(self._revive(hit))
        for recovery in revived:
            self.parts[recovery.part].until_it_serves()
            recovery.ready_seconds = time.time() - recovery.revived_at
        self.recoveries += revived

    def _revive(self, hit: Hit) -> Recovery:
        part = self.parts[hit.part]
        now = time.time()
        if hit.action == FREEZE:
            part.body.thaw()
        else:
            part.body.start()
        return Recovery(part.kind, part.name, hit.action, now)


@dataclass(frozen=True)
class Told:
    """What the workers' logs tell: when each opened requests, what was swept, and what it was that
    kept it from opening a payload, by the payload's id."""

    opened_at: Mapping[str, list[float]]
    swept_objects: int
    errors: Mapping[str, list[str]]

    @classmethod
    def by(cls, folders: Mapping[str, Path]) -> "Told":
        opened_at: dict[str, list[float]] = {}
        swept_objects = 0
        errors: dict[str, list[str]] = {}
        for name, folder in folders.items():
            opened_at[name] = []
            for told in _log_lines(folder / "output"):
                if told["event"] == "workflow request opened":
                    at = datetime.fromisoformat(told["timestamp"]).timestamp()
                    opened_at[name].append(at)
                elif told["event"] == "swept":
                    swept_objects += told["objects"]
                elif "payload_id" in told and "error" in told:
                    errors.setdefault(told["payload_id"], []).append(told["error"])
        return cls(opened_at, swept_objects, errors)


def _log_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(errors="replace").splitlines():
        # The last line before a kill may be cut.
        with suppress(ValueError):
            told = json.loads(line)
            if isinstance(told, dict) and "event" in told:
                yield told


@dataclass(frozen=True)
class Report:
    options: Options
    ledger: Ledger
    told: Told
    given_up: int
    orphans_before: int
    orphans_after: tuple[str, ...]
    recoveries: Sequence[Recovery]
    stop_seconds: Mapping[str, Sequence[float]]
    posting_seconds: float
    seconds: float

    @property
    def must_be_zero(self) -> list[Finding]:
        return [
            *self.ledger.must_be_zero(),
            Finding("given up by their sender", ("",) * self.given_up),
            Finding("orphans after the sweep", self.orphans_after),
        ]

    @property
    def published_twice(self) -> Finding:
        """As the ledger has it, with what the workers said of each payload before."""
        found = self.ledger.published_twice()
        died = ["a worker crashed or paused in between"]
        reasons = ("; ".join(self.told.errors.get(c.split()[1], died)) for c in found.cases)
        return Finding(
            found.name, tuple(f"{c} {r}" for c, r in zip(found.cases, reasons, strict=True))
        )

    @property
    def failed(self) -> bool:
        return any(finding.count for finding in self.must_be_zero)

    def lines(self) -> Iterator[str]:
        ledger = self.ledger
        acknowledged = {a.post.number for a in ledger.acknowledged}
        twice = self.published_twice
        instances = sum(len(a.stored) for a in ledger.acknowledged)
        yield f"seed {self.options.seed}, {self.options.senders} senders"
        yield from _table(
            [
                ("posts", self.options.posts),
                ("attempts", len(ledger.attempts)),
                ("acknowledged posts", len(acknowledged)),
                ("acknowledged instances", instances),
                ("payloads recorded", len(ledger.payloads)),
                ("recorded, answer lost, sent again", ledger.recorded_without_answer()),
                ("requests received", len({d.payload_id for d in ledger.deliveries})),
                ("published twice", twice.count),
                ("refusals noted", len(ledger.noted)),
                ("replays published", len(ledger.replayed)),
                ("redelivered by the broker", ledger.redelivered()),
                ("orphans before the sweep", self.orphans_before),
                ("posting, s", f"{self.posting_seconds:.0f}"),
                ("in all, s", f"{self.seconds:.0f}"),
            ]
        )
        answers = sorted(ledger.answers().items(), key=lambda pair: -pair[1])
        yield f"answers: {', '.join(f'{name} {count}' for name, count in answers)}"
        yield ""
        yield "must be 0"
        yield from _table([(finding.name, finding.count) for finding in self.must_be_zero])
        yield ""
        yield from self._recovery_table()
        for finding in [*self.must_be_zero, twice]:
            if finding.count:
                yield ""
                yield f"{finding.name}: {finding.count}"
                yield from (f"  {case}" for case in finding.cases[:_CASES_SHOWN])

    def _recovery_table(self) -> Iterator[str]:
        columns = "{:<14}{:>7}{:>8}{:>11}  {:>15}  {:>15}  {:>15}"
        times = "median / max s"
        yield columns.format(
            "", "killed", "frozen", "restarted", "ready", "first success", "SIGTERM"
        )
        yield columns.format("", "", "", "", times, times, times)
        for kind in KINDS:
            own = [r for r in self.recoveries if r.kind == kind]
            counts = Counter(r.action for r in own)
            yield columns.format(
                kind,
                *(counts[action] for action in ACTIONS),
                _median_and_max([r.ready_seconds for r in own]),
                _median_and_max([r.first_success_seconds for r in own]),
                _median_and_max(self.stop_seconds.get(kind, [])),
            )

    def as_json(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "must_be_zero": {finding.name: finding.count for finding in self.must_be_zero},
            "acknowledged": len({a.post.number for a in self.ledger.acknowledged}),
            "published_twice": self.ledger.published_twice().count,
            "refusals": len(self.ledger.noted),
            "replays": len(self.ledger.replayed),
            "orphans_before": self.orphans_before,
            "hits": [[r.kind, r.action] for r in self.recoveries],
        }


def _table(rows: Sequence[tuple[str, object]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"  {name:<{width}}  {value!s:>8}"


def _median_and_max(seconds: Sequence[float | None]) -> str:
    known = [s for s in seconds if s is not None]
    return f"{statistics.median(known):.1f} / {max(known):.1f}" if known else "-"


@dataclass
class Soak:
    """One run, in a folder that holds everything it leaves."""

    options: Options
    folder: Path
    say: Callable[[str], None]

    def run(self) -> Report:
        """Raises `NotToBeHad` without engines, `TimeoutError` where a part does not come back."""
        began = time.monotonic()
        with ExitStack() as stack:
            store, endpoint = object_store(self.folder / "object-store", stack, self.say)
            queue, broker_url = broker(self.folder / "broker", stack, self.say)
            parts, urls = self._services(endpoint, broker_url, stack)
            wanted = WorkflowRequests(
                broker_url,
                self.folder / "requests.jsonl",
                self.options.refused_share,
                self.options.seed,
            )
            wanted.start()
            stack.callback(wanted.stop)
            dead_letter_at_least_once(queue, QUEUE)
            _until_ready(urls.values())
            # RabbitMQ 3.10 registers a new quorum queue on disk half a second late, and one that a
            # kill comes before is dead for ever. A queue is new once, so that is not our subject.
            queue.body.terminate()
            queue.body.start()
            queue.until_it_serves()
            _until_ready(urls.values())
            parts = [*parts, store, queue]
            api_urls = {name: url for name, url in urls.items() if name.startswith(API)}
            _create_vae(api_urls)

            attempts: list[Attempt] = []
            chaos = Chaos({part.name: part for part in parts}, self.say)
            posting_began = time.monotonic()
            given_up = self._post(api_urls, attempts, chaos, wanted)
            posting_seconds = time.monotonic() - posting_began
            for part in parts:
                part.until_it_serves()

            bucket = Bucket(object_store_client(endpoint))
            api = Status(list(api_urls.values()))
            self._until_nothing_is_pending(api)
            wanted.refusing = False
            self._until_nothing_is_refused(api)
            payloads = api.payloads()
            left = orphans(bucket.keys(), payloads)
            folders = {part.name: self._folder(part.name) for part in parts if part.kind == WORKER}
            orphans_before = Told.by(folders).swept_objects + len(left)
            self._until_swept(bucket, api, left)
            self._until_nothing_is_pending(api)
            wanted.drain()
            self.say("reading everything that is stored")
            payloads, keys = api.payloads(), bucket.keys()
            state = Bucket(object_store_client(endpoint), STATE_BUCKET)
            ledger = Ledger(
                attempts,
                wanted.deliveries,
                payloads,
                keys,
                bucket.sha256(keys),
                rejected=frozenset(wanted.rejected),
                dead_letters=frozenset(wanted.dead_letters),
                noted=state.requests_in("refused/"),
                replayed=state.requests_in("replayed/"),
            )
            told = Told.by(folders)
            _find_first_successes(chaos.recoveries, ledger, told)
            return Report(
                options=self.options,
                ledger=ledger,
                told=told,
                given_up=given_up,
                orphans_before=orphans_before,
                orphans_after=tuple(ledger.orphans()),
                recoveries=chaos.recoveries,
                stop_seconds=chaos.stop_seconds,
                posting_seconds=posting_seconds,
                seconds=time.monotonic() - began,
            )

    def _folder(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def _services(
        self, endpoint: ObjectStoreEndpoint, broker_url: str, stack: ExitStack
    ) -> tuple[list[Part], dict[str, str]]:
        settings = {
            "STOWGATE_OBJECT_STORE": endpoint.url,
            "STOWGATE_OBJECT_STORE_ACCESS_KEY": endpoint.access_key,
            "STOWGATE_OBJECT_STORE_SECRET_KEY": endpoint.secret_key,
            "STOWGATE_BUCKET": BUCKET,
            "STOWGATE_STATE_BUCKET": STATE_BUCKET,
            "STOWGATE_BROKER": broker_url,
            "STOWGATE_LEASE_SECONDS": str(self.options.lease_seconds),
            "STOWGATE_MAX_UPLOAD_SECONDS": str(self.options.max_upload_seconds),
            "STOWGATE_SWEEP_SECONDS": str(self.options.sweep_seconds),
        }
        parts, urls = [], {}
        for kind in (API, WORKER):
            for number in (1, 2):
                name = f"{kind} {number}"
                part, url = stowgate(kind, name, self._folder(name), settings, stack)
                part.body.start()
                parts.append(part)
                urls[name] = url
        return parts, urls

    def _post(
        self,
        urls: dict[str, str],
        attempts: list[Attempt],
        chaos: Chaos,
        wanted: WorkflowRequests,
    ) -> int:
        """Send everything under the blows; returns how many posts were given up."""
        gate, options = Gate(), self.options
        failures: list[BaseException | None] = []
        book = (self.folder / "attempts.jsonl").open("w")

        def write_down(attempt: Attempt) -> None:
            attempts.append(attempt)
            row = {
                "post": attempt.post.number,
                "path": attempt.post.path,
                "key": attempt.post.key,
                "correlation_id": attempt.correlation_id,
                "api": attempt.api,
                "began": attempt.began,
                "ended": attempt.ended,
                "status": attempt.status,
                "error": attempt.error,
                "payload_id": attempt.payload_id,
                "sha256": dict(attempt.post.sha256),
            }
            book.write(json.dumps(row) + "\n")

        senders = Senders(
            urls, Studies(options.seed), options.posts, options.seed, gate.may_send, write_down
        )
        blows = schedule(options, list(chaos.parts.values()))
        stopping = threading.Event()
        replays = threading.Thread(target=_replay_some, args=[urls, options.seed, stopping])
        with ThreadPoolExecutor(options.senders + 1) as threads:
            replays.start()
            work = {threads.submit(senders.run) for _ in range(options.senders)}
            work.add(threads.submit(chaos.run, blows, gate, options.posts))
            while work:
                done, work = wait(work, _PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
                if any(part.exception() for part in done):
                    gate.abort()
                acknowledged = len({a.post.number for a in list(attempts) if a.acknowledged})
                self.say(
                    f"{acknowledged}/{options.posts} posts acknowledged, {len(attempts)} attempts, "
                    f"{len(wanted.deliveries)} requests"
                )
                failures += [part.exception() for part in done]
            stopping.set()
            replays.join()
        book.close()
        for failure in failures:
            if failure is not None and not isinstance(failure, Aborted):
                raise failure
        return len(senders.given_up)

    def _until_nothing_is_pending(self, api: "Status") -> None:
        """Or until that has made no progress for long: what still waits then is lost, and the
        report will say so."""
        fewest, deadline, next_word = sys.maxsize, 0.0, time.monotonic() + _PROGRESS_SECONDS
        while pending := api.pending():
            now = time.monotonic()
            if pending < fewest:
                fewest, deadline = pending, now + _SETTLE_SECONDS
            if now > deadline:
                return
            if now > next_word:
                self.say(f"waiting for {pending} pending payloads")
                next_word = now + _PROGRESS_SECONDS
            time.sleep(0.2)

    def _until_nothing_is_refused(self, api: "Status") -> None:
        """Replay what is refused, until nothing is; in the end, what still is counts as lost.

        A dead letter may be on its way, so what was replayed may be refused a second time.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        quiet_since = time.monotonic()
        while time.monotonic() < min(deadline, quiet_since + _QUIET_SECONDS):
            refused = list(api.payloads("refused"))
            if refused or api.pending():
                quiet_since = time.monotonic()
            if refused:
                self.say(f"replaying {len(refused)} payloads that were refused")
            for payload_id in refused:
                api.replay(payload_id)
            self._until_nothing_is_pending(api)
            time.sleep(0.2)

    def _until_swept(self, bucket: "Bucket", api: "Status", left: Sequence[str]) -> None:
        seconds = self.options.sweep_grace_seconds + 2 * self.options.sweep_seconds + 30
        deadline = time.monotonic() + seconds
        ids = {key.partition("/")[0] for key in left}
        if ids:
            self.say(f"waiting for the sweep of {len(ids)} uploads that died")
        while ids and time.monotonic() < deadline:
            ids = {i for i in ids if bucket.keys(f"{i}/") and not api.knows(i)}
            time.sleep(0.2)


@dataclass(frozen=True)
class Status:
    """What the API tells of payloads; either replica may be asked."""

    urls: Sequence[str]

    def payloads(self, state: str | None = None) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        cursor = None
        while True:
            given = {"limit": _PAGE, "state": state, "cursor": cursor}
            page = self._get("/payloads", given).json()
            found |= {payload["payload_id"]: payload for payload in page["payloads"]}
            cursor = page["next"]
            if cursor is None:
                return found

    def pending(self) -> int:
        # One that is settled and not moved yet is listed too, with the state that counts.
        return sum(p["state"] == "pending" for p in self.payloads("pending").values())

    def replay(self, payload_id: str) -> None:
        """202, or 409 where it is being replayed already; whatever else is tried again later."""
        with suppress(*NOT_SERVING):
            requests.post(f"{self.urls[0]}/payloads/{payload_id}/replay", timeout=60)

    def knows(self, payload_id: str) -> bool:
        return self._get(f"/payloads/{payload_id}", {}).status_code == 200

    def _get(self, path: str, given: Mapping[str, Any]) -> requests.Response:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            for url in self.urls:
                with suppress(*NOT_SERVING):
                    answer = requests.get(url + path, params=given, timeout=60)
                    if answer.status_code < 500:
                        return answer
            if time.monotonic() > deadline:
                raise TimeoutError(f"no API answers GET {path}")
            time.sleep(0.2)


@dataclass(frozen=True)
class Bucket:
    client: Minio
    name: str = BUCKET

    def requests_in(self, prefix: str) -> frozenset[Request]:
        """The requests that objects are about whose keys are {prefix}{order}.{payload}/{n}.json."""
        found = (_FACT.fullmatch(key.removeprefix(prefix)) for key in self.keys(prefix))
        return frozenset((match[1], int(match[2])) for match in found if match)

    def keys(self, prefix: str = "") -> frozenset[str]:
        """Asked again where it must be: MinIO takes a while to trust its drive after a freeze."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            try:
                found = self.client.list_objects(
                    bucket_name=self.name, prefix=prefix, recursive=True
                )
                return frozenset(o.object_name for o in found if o.object_name)
            except (MinioException, HTTPError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def sha256(self, keys: frozenset[str]) -> dict[str, str]:
        instances = [key for key in keys if key.endswith(".dcm")]
        with ThreadPoolExecutor(4) as threads:
            return dict(zip(instances, threads.map(self._sha256, instances), strict=True))

    def _sha256(self, key: str) -> str:
        answer = self.client.get_object(bucket_name=BUCKET, object_name=key)
        try:
            return hashlib.sha256(answer.read()).hexdigest()
        finally:
            answer.close()
            answer.release_conn()


def _find_first_successes(recoveries: Sequence[Recovery], ledger: Ledger, told: Told) -> None:
    acknowledged = sorted((a.ended, a.api) for a in ledger.acknowledged)
    requested = sorted(delivery.at for delivery in ledger.deliveries)
    for recovery in recoveries:
        successes = {
            API: [at for at, api in acknowledged if api == recovery.part],
            OBJECT_STORE: [at for at, _ in acknowledged],
            BROKER: requested,
            WORKER: told.opened_at.get(recovery.part, []),
        }[recovery.kind]
        later = [at for at in successes if at > recovery.revived_at]
        if later:
            recovery.first_success_seconds = later[0] - recovery.revived_at


def _replay_some(urls: Mapping[str, str], seed: int, stopping: threading.Event) -> None:
    """Replay what is refused while everything is killed, now and then the same one twice."""
    rng = random.Random(f"{seed}/replays")
    while not stopping.wait(rng.uniform(0.2, 1.0)):
        api = Status(rng.sample(sorted(urls.values()), len(urls)))
        with suppress(TimeoutError, ValueError, KeyError):
            for payload_id in list(api.payloads("refused"))[:20]:
                if stopping.is_set():
                    return
                for _ in range(rng.choice([1, 2])):
                    api.replay(payload_id)


def _create_vae(urls: Mapping[str, str]) -> None:
    vae = {"virtualAeTitle": VAE, "workflows": [VAE_WORKFLOW]}
    requests.post(f"{min(urls.values())}/config/vae", json=vae, timeout=30).raise_for_status()


def _until_ready(urls: Iterable[str]) -> None:
    """Until each service says that it has all that it needs, the broker too."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    for url in urls:
        while not _is_ready(url):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url}/health/ready does not say ready")
            time.sleep(0.1)


def _is_ready(url: str) -> bool:
    with suppress(*NOT_SERVING):
        return bool(requests.get(f"{url}/health/ready", timeout=10).json()["status"] == "ready")
    return False


def _options(arguments: argparse.Namespace) -> Options:
    posts = arguments.posts
    return Options(
        posts=posts,
        seed=random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed,
        senders=arguments.senders,
        posts_per_blow=arguments.posts_per_blow,
        lease_seconds=arguments.lease_seconds,
        max_upload_seconds=arguments.max_upload_seconds,
        sweep_seconds=arguments.sweep_seconds,
        refused_share=arguments.refused_share,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posts", type=int, default=1000)
    parser.add_argument("--seed", type=int, help="a random one if not given")
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--posts-per-blow", type=int, default=70)
    parser.add_argument("--lease-seconds", type=int, default=10)
    parser.add_argument("--max-upload-seconds", type=int, default=10)
    parser.add_argument("--sweep-seconds", type=int, default=5)
    parser.add_argument(
        "--refused-share", type=float, default=0.1, help="of the requests, which are rejected"
    )
    parser.add_argument("--report", type=Path, help="write the result there too, as JSON")
    arguments = parser.parse_args()
    options = _options(arguments)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="stowgate-chaos-"))
    say(f"seed {options.seed}, {options.posts} posts, {options.senders} senders; all in {folder}")
    try:
        report = Soak(options, folder, say).run()
    except NotToBeHad as why:
        say(f"engine missing: {why}")
        shutil.rmtree(folder, ignore_errors=True)
        return 2
    except TimeoutError as why:
        say(f"FAILED: {why}; everything is kept in {folder}")
        return 1
    print("\n".join(report.lines()), flush=True)
    if arguments.report:
        arguments.report.write_text(json.dumps(report.as_json()))
    if report.failed:
        say(f"FAILED; everything is kept in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
