"""How many requests a POST and its opening cost the object store, counted on their way to MinIO."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import ObjectStoreEndpoint
from instances import one_series, real_file
from service import wait_for
from stowgate_site import Node, Site

_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) /([^ ?]+)\S* HTTP/1\.1\r\n")

_KINDS = {
    rb"dcm/.*\.dcm": "instance",
    rb"dcm/.*\.json": "sidecar",
    rb"pending/.*": "pending record",
    rb"opened/.*": "opened record",
    rb"uploads/.*": "attachment",
}


class SiteKeepingRequests(Site):
    keeps_requests = True


@pytest.fixture
def site(
    broker_url: str, object_store_endpoint: ObjectStoreEndpoint, tmp_path: Path
) -> Iterator[Site]:
    found = SiteKeepingRequests(
        tmp_path,
        broker_url,
        object_store_endpoint,
        # Nothing expires while a slow machine opens many instances.
        STOWGATE_LEASE_SECONDS="600",
    )
    found.start_workflow_manager()
    try:
        yield found
    finally:
        found.close()
        found.remove()


def requests_about(payload_id: str, nodes: tuple[Node, Node]) -> Counter[str]:
    """Those whose key names the payload, such as "PUT sidecar".

    The removal from pending/ has the names of many payloads in its body.
    """
    counted: Counter[str] = Counter()
    for node in nodes:
        for method, path in _REQUEST.findall(bytes(node.store.asked)):
            if payload_id.encode() not in path:
                continue
            (kind,) = (kind for key, kind in _KINDS.items() if re.search(rb"/" + key + rb"$", path))
            counted[f"{method.decode()} {kind}"] += 1
    return counted


def opened(site: Site, api: Node, instances: list[bytes]) -> str:
    answer = site.post(api, instances)
    assert answer.status_code == 200
    payload_id = answer.headers["X-Payload-ID"]
    site.opened(payload_id)
    wait_for(lambda: not any(payload_id in key for key in site.state.listing("pending/")))
    return str(payload_id)


def test_a_single_post_and_its_opening_cost_five_requests_and_a_share_of_a_removal(
    site: Site,
) -> None:
    api, worker = site.pair()

    payload_id = opened(site, api, [real_file("CT_small.dcm")])

    assert requests_about(payload_id, (api, worker)) == {
        "PUT instance": 1,
        "PUT pending record": 1,
        "GET instance": 1,
        "PUT sidecar": 1,
        "PUT opened record": 1,
    }


def test_each_of_many_instances_costs_three_requests(site: Site) -> None:
    api, worker = site.pair()

    payload_id = opened(site, api, list(one_series(200)))

    counted = requests_about(payload_id, (api, worker))
    assert counted["PUT instance"] == counted["GET instance"] == counted["PUT sidecar"] == 200
    assert counted.total() <= 3.1 * 200
