"""A short chaos soak, and the books that it is judged by."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chaos import KILL, KINDS
from ledger import Attempt, Delivery, Ledger, Post

CHAOS = Path(__file__).with_name("chaos.py")
ENGINE_MISSING = 2


@pytest.mark.timeout(600)  # an engine may have to be installed or built first
def test_nothing_is_lost_or_duplicated_while_every_process_is_killed_in_turn(
    tmp_path: Path,
) -> None:
    report = tmp_path / "report.json"
    options = "--posts 150 --posts-per-blow 25 --lease-seconds 3 --max-upload-seconds 6"
    soak = subprocess.run(
        [sys.executable, CHAOS, *options.split(), "--sweep-seconds", "1", "--report", report],
        env={**os.environ, "PYTHONPATH": str(CHAOS.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if soak.returncode == ENGINE_MISSING and not os.environ.get("CI"):
        pytest.skip(soak.stdout)

    assert soak.returncode == 0, soak.stdout
    result = json.loads(report.read_bytes())
    assert result["acknowledged"] == 150
    assert set(result["must_be_zero"].values()) == {0}
    assert result["replays"] == result["refusals"] > 0
    assert {kind for kind, action in result["hits"] if action == KILL} == set(KINDS)


POST = Post(
    number=1,
    path="/dicomweb/studies",
    study_uid="1.2",
    series_uid="1.2.3",
    sha256={"1.2.3.4": "aa"},
    workflows=(),
    destination="default",
    key="k",
)
ATTEMPT = Attempt(
    POST, "c", "api 1", 0.0, 1.0, 200, None, "p", frozenset({"1.2.3.4"}), answer_sha256="bb"
)
REQUEST: dict[str, Any] = {
    "payload_id": "p",
    "correlation_id": "c",
    "workflows": [],
    "trigger": {"destination": "default"},
    "payload": [{"path": "dcm/1.2/1.2.3/1.2.3.4.dcm"}],
}
DELIVERY = Delivery("p", b"{}", REQUEST, redelivered=False, at=2.0)
OPENED = {"correlation_id": "c", "state": "opened", "attempts": 1, "last_error": None}
INSTANCE = "p/dcm/1.2/1.2.3/1.2.3.4.dcm"
WHOLE = Ledger(
    attempts=[ATTEMPT],
    deliveries=[DELIVERY],
    payloads={"p": OPENED},
    object_keys=frozenset({INSTANCE, f"{INSTANCE}.json"}),
    sha256={INSTANCE: "aa"},
)


REFUSED = replace(
    WHOLE,
    deliveries=[DELIVERY, replace(DELIVERY, number=1)],
    rejected=frozenset({("p", 0)}),
    dead_letters=frozenset({("p", 0)}),
    noted=frozenset({("p", 0)}),
    replayed=frozenset({("p", 1)}),
)


def _found(ledger: Ledger) -> dict[str, int]:
    return {finding.name: finding.count for finding in ledger.must_be_zero() if finding.count}


def test_a_consistent_ledger_has_no_findings() -> None:
    assert _found(WHOLE) == {}
    assert WHOLE.orphans() == []
    assert WHOLE.published_twice().count == 0


def test_a_replay_is_neither_duplicated_nor_published_twice() -> None:
    assert _found(REFUSED) == {}
    assert REFUSED.published_twice().count == 0


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda ledger: replace(ledger, deliveries=[]), "acknowledged and lost"),
        (lambda ledger: replace(ledger, payloads={}), "acknowledged and lost"),
        (
            lambda ledger: replace(ledger, payloads={"p": {**OPENED, "state": "failed"}}),
            "acknowledged and lost",
        ),
        (
            lambda ledger: replace(ledger, attempts=[replace(ATTEMPT, status=None)], deliveries=[]),
            "recorded, but no request opened",
        ),
        (
            lambda ledger: replace(ledger, attempts=[replace(ATTEMPT, correlation_id="d")]),
            "requests without a recorded POST of ours",
        ),
        (lambda ledger: replace(ledger, payloads={}), "requests without a recorded POST of ours"),
        (
            lambda ledger: replace(
                ledger,
                deliveries=[DELIVERY, replace(DELIVERY, payload_id="q")],
                payloads={"p": OPENED, "q": OPENED},
            ),
            "doubled requests",
        ),
        (
            lambda ledger: replace(ledger, deliveries=[DELIVERY, replace(DELIVERY, body=b"{ }")]),
            "doubled requests",
        ),
        (
            lambda ledger: replace(ledger, deliveries=[DELIVERY] * 3),
            "published more often than attempted",
        ),
        (
            lambda ledger: replace(ledger, deliveries=[replace(DELIVERY, violations=("no",))]),
            "requests that break the contract",
        ),
        (
            lambda ledger: replace(
                ledger, deliveries=[replace(DELIVERY, request={**REQUEST, "payload": []})]
            ),
            "requests that differ from their POST",
        ),
        (lambda ledger: replace(ledger, sha256={}), "stored bytes different or missing"),
        (
            lambda ledger: replace(ledger, sha256={INSTANCE: "cc"}),
            "stored bytes different or missing",
        ),
        (
            lambda ledger: replace(ledger, object_keys=frozenset({INSTANCE})),
            "sidecars missing",
        ),
        (
            lambda ledger: replace(ledger, attempts=[replace(ATTEMPT, stored=frozenset())]),
            "acknowledged, but not every instance",
        ),
        (
            lambda ledger: replace(ledger, payloads={"p": OPENED, "q": OPENED}),
            "keys with more than one payload",
        ),
        (
            lambda ledger: replace(ledger, attempts=[ATTEMPT, replace(ATTEMPT, payload_id="q")]),
            "keys with more than one payload",
        ),
        (
            lambda ledger: replace(
                ledger, attempts=[ATTEMPT, replace(ATTEMPT, answer_sha256="dd")]
            ),
            "keys with more than one answer",
        ),
        (
            lambda ledger: replace(ledger, dead_letters=frozenset({("p", 0)})),
            "refused and not noted",
        ),
        (
            lambda ledger: replace(
                ledger,
                noted=frozenset({("p", 0)}),
                replayed=frozenset({("p", 1)}),
                deliveries=[DELIVERY, replace(DELIVERY, number=1)],
            ),
            "noted and not refused",
        ),
        (lambda _: replace(REFUSED, replayed=frozenset()), "replays lost"),
        (lambda _: replace(REFUSED, deliveries=[DELIVERY]), "replays lost"),
        (
            lambda _: replace(REFUSED, payloads={"p": {**OPENED, "state": "refused"}}),
            "acknowledged and lost",
        ),
    ],
)
def test_an_inconsistent_ledger_reports_the_differences(
    spoil: Callable[[Ledger], Ledger], finding: str
) -> None:
    assert _found(spoil(WHOLE))[finding] == 1


def test_a_second_publication_by_a_second_attempt_is_reported_but_not_as_duplicate() -> None:
    ledger = replace(
        WHOLE, deliveries=[DELIVERY, DELIVERY], payloads={"p": {**OPENED, "attempts": 2}}
    )

    assert _found(ledger) == {}
    assert ledger.published_twice().count == 1


@pytest.mark.parametrize("first_came_redelivered", [False, True])
def test_a_redelivered_message_is_not_a_publication(
    first_came_redelivered: bool,
) -> None:
    first = replace(DELIVERY, redelivered=first_came_redelivered)
    ledger = replace(WHOLE, deliveries=[first, replace(DELIVERY, redelivered=True)])

    assert _found(ledger) == {}
    assert ledger.published_twice().count == 0
    assert ledger.redelivered() == 1


def test_objects_of_a_payload_without_a_record_are_orphans() -> None:
    beside = "q/dcm/1.2/1.2.3/1.2.3.4.dcm"

    assert replace(WHOLE, object_keys=WHOLE.object_keys | {beside}).orphans() == [beside]
