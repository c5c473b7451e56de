"""`config/vae`: the formats of the Informatics Gateway, and the shared registry."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
import requests
from instances import new_instance
from service import Service, running, wait_for


def _call(service: Service, method: str, path: str = "", body: Any = None) -> requests.Response:
    return requests.request(method, f"{service.url}/config/vae{path}", json=body, timeout=30)


def _title() -> str:
    return f"AE-{uuid4().hex[:8]}"


def test_a_new_vae_is_201_with_its_location_and_can_be_read(stowgate: Service) -> None:
    title = _title()

    created = _call(stowgate, "POST", body={"virtualAeTitle": title, "workflows": ["a", "b"]})

    assert created.status_code == 201
    vae = created.json()
    assert created.headers["Location"].endswith(f"/config/vae/{title}")
    assert set(vae) == {
        "name",
        "virtualAeTitle",
        "workflows",
        "plugInAssemblies",
        "dateTimeCreated",
    }
    assert (vae["name"], vae["virtualAeTitle"], vae["workflows"]) == (title, title, ["a", "b"])
    assert _call(stowgate, "GET", f"/{title}").json() == vae
    assert vae in _call(stowgate, "GET").json()


@pytest.mark.parametrize("name", [None, "", " "])
def test_a_blank_name_defaults_to_the_ae_title(stowgate: Service, name: str | None) -> None:
    title = _title()

    created = _call(stowgate, "POST", body={"virtualAeTitle": title, "name": name})

    assert (created.status_code, created.json()["name"]) == (201, title)
    assert _call(stowgate, "PUT", body={"name": name, "workflows": []}).status_code == 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "virtualAeTitle"),
        ({"virtualAeTitle": "sixteen-letters-"}, "1 to 15"),
        ({"virtualAeTitle": "with space"}, "1 to 15"),
        ({"virtualAeTitle": ""}, "1 to 15"),
        ({"virtualAeTitle": "ok", "name": "../up"}, "name"),
        ({"virtualAeTitle": "ok", "workflows": ["fine", "not fine"]}, "item 1"),
        ({"virtualAeTitle": "ok", "workflows": [""]}, "workflows"),
        ({"virtualAeTitle": "ok", "workflows": "one"}, "workflows"),
        ({"virtualAeTitle": "plug-ins"}, "plug-ins"),
    ],
)
def test_an_invalid_vae_is_400_with_the_broken_rule(
    stowgate: Service, body: Any, words: str
) -> None:
    answer = _call(stowgate, "POST", body=body)

    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert words in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"LUNG"', b"1", b"null"])
def test_a_body_other_than_a_json_object_is_400(stowgate: Service, body: bytes) -> None:
    answer = requests.post(f"{stowgate.url}/config/vae", data=body, timeout=30)

    assert answer.status_code == 400
    assert answer.json()["detail"] == "the body must be a JSON object that describes a VAE"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_with_the_limit(stowgate: Service, chunked: bool) -> None:
    body = json.dumps({"virtualAeTitle": _title()}).encode().ljust(1_048_577)
    pieces = (body[start : start + 100_000] for start in range(0, len(body), 100_000))

    answer = requests.post(
        f"{stowgate.url}/config/vae", data=pieces if chunked else body, timeout=30
    )

    assert answer.status_code == 413
    assert "1048576 bytes" in answer.json()["detail"]


def test_name_and_ae_title_are_unique(stowgate: Service) -> None:
    name, title = _title(), _title()
    assert _call(stowgate, "POST", body={"name": name, "virtualAeTitle": title}).status_code == 201

    same_name = _call(stowgate, "POST", body={"name": name, "virtualAeTitle": _title()})
    same_title = _call(stowgate, "POST", body={"name": _title(), "virtualAeTitle": title})

    assert (same_name.status_code, same_title.status_code) == (409, 409)
    assert "VAE name" in same_name.json()["detail"]
    assert "AE title" in same_title.json()["detail"]


def test_put_changes_workflows_and_nothing_else(stowgate: Service) -> None:
    title = _title()
    before = _call(stowgate, "POST", body={"virtualAeTitle": title, "workflows": ["a"]}).json()

    answer = _call(
        stowgate,
        "PUT",
        body={
            "name": title,
            "workflows": ["b"],
            "virtualAeTitle": "other",
        },
    )

    assert answer.status_code == 200
    after = answer.json()
    assert after["workflows"] == ["b"]
    assert after.pop("dateTimeUpdated") >= before["dateTimeCreated"]
    assert after | {"workflows": ["a"]} == before


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_plug_in_that_is_not_there_is_refused_and_changes_nothing(
    stowgate: Service, method: str
) -> None:
    title = _title()
    if method == "PUT":
        assert _call(stowgate, "POST", body={"virtualAeTitle": title}).status_code == 201
    plug_ins = {"plugInAssemblies": ["Some.PlugIn, Assembly"]}

    answer = _call(
        stowgate,
        method,
        body={"name": title, "virtualAeTitle": title, "workflows": ["a"]} | plug_ins,
    )

    assert answer.status_code == 400
    assert "no input plug-in of that name" in answer.json()["detail"]
    assert "/config/vae/plug-ins" in answer.json()["detail"]
    left = _call(stowgate, "GET", f"/{title}")
    assert left.status_code == 404 or left.json()["workflows"] == []
    no_plug_ins: list[str] = []
    for none in (no_plug_ins, None):
        allowed = _call(
            stowgate, "POST", body={"virtualAeTitle": _title(), "plugInAssemblies": none}
        )
        assert allowed.status_code == 201


@pytest.mark.parametrize(
    ("body", "status"),
    [({"name": "nobody"}, 404), ({"workflows": []}, 400), ({"name": "x", "workflows": [1]}, 400)],
)
def test_put_rejects_changes_that_are_not_allowed(
    stowgate: Service, body: Any, status: int
) -> None:
    assert _call(stowgate, "PUT", body=body).status_code == status


def test_delete_returns_the_entity_and_then_404(stowgate: Service) -> None:
    title = _title()
    vae = _call(stowgate, "POST", body={"virtualAeTitle": title}).json()

    first, second = (_call(stowgate, "DELETE", f"/{title}") for _ in range(2))

    assert (first.status_code, first.json()) == (200, vae)
    assert second.status_code == 404
    assert _call(stowgate, "GET", f"/{title}").status_code == 404


def test_plug_ins_are_listed(stowgate: Service) -> None:
    answer = _call(stowgate, "GET", "/plug-ins")

    assert (answer.status_code, answer.json()) == (200, {})


def test_one_of_many_concurrent_creations_of_a_vae_wins(stowgate: Service) -> None:
    title = _title()

    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda number: _call(
                    stowgate, "POST", body={"name": f"{title}{number:02}", "virtualAeTitle": title}
                ),
                range(16),
            )
        )

    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201] + [409] * 15


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """Runs two APIs and a worker on one folder."""
    data = tmp_path_factory.mktemp("replicas")
    # Without a broker between them, a payload waits for the end of its first lease.
    lease = {"STOWGATE_LEASE_SECONDS": "2"}
    with (
        running("api", data, **lease) as one,
        running("api", data, **lease) as two,
        running("worker", data, **lease),
    ):
        yield one, two


def test_a_change_at_one_replica_is_visible_at_the_other(
    replicas: tuple[Service, Service],
) -> None:
    one, two = replicas
    title = _title()
    path = f"/dicomweb/vae/{title}/studies"

    def workflows(service: Service) -> list[str]:
        answer = service.post(path, new_instance(), "application/dicom")
        assert answer.status_code == 200
        return list(service.opened(answer.headers["X-Payload-ID"])["workflows"])

    assert two.post(path, new_instance(), "application/dicom").status_code == 400
    _call(one, "POST", body={"virtualAeTitle": title, "workflows": ["first"]})
    assert workflows(two) == ["first"]
    _call(one, "PUT", body={"name": title, "workflows": ["second"]})
    wait_for(lambda: workflows(two) == ["second"], seconds=20)
    _call(one, "DELETE", f"/{title}")
    wait_for(
        lambda: two.post(path, new_instance(), "application/dicom").status_code == 400, seconds=20
    )
