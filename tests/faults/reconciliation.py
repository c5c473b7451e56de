"""What every fault ends with: records, objects and workflow requests held against what was sent."""

import hashlib
from contextlib import suppress

from ledger import Ledger
from service import wait_for
from stowgate_site import Site

_SETTLE_SECONDS = 60.0


def reconcile(site: Site, *, published_twice: int = 0, stop: bool = True) -> Ledger:
    """Wait until nothing is pending, end the services, and compare everything.

    Acknowledged and lost, requested without a recorded POST, doubled, and stored with other bytes
    than were sent must all be none. `published_twice` payloads must have come twice under the same
    id. With `stop` off the services go on, for tests that share them.
    """

    def settled() -> bool:
        acknowledged = {a.payload_id for a in site.attempts if a.acknowledged}
        records = site.records()
        requested = {delivery.payload_id for delivery in site.take_requests()}
        return (
            acknowledged <= records.keys()
            and all(record["state"] != "pending" for record in records.values())
            and requested >= {i for i, record in records.items() if record["state"] == "opened"}
            and site.waiting(site.event_queue) == 0
        )

    with suppress(AssertionError):  # the findings tell more
        wait_for(settled, _SETTLE_SECONDS, pause_seconds=0.1)
    if stop:
        site.stop()
    site.take_requests()
    keys = site.payloads.listing()
    instances = {key: site.payloads.get(key) for key in keys if key.endswith(".dcm")}
    ledger = Ledger(
        attempts=site.attempts,
        deliveries=site.deliveries,
        payloads=site.records(),
        object_keys=frozenset(keys),
        sha256={k: hashlib.sha256(data).hexdigest() for k, data in instances.items() if data},
    )
    findings = {finding.name: finding.cases for finding in ledger.must_be_zero() if finding.count}
    assert findings == {}, findings
    twice = ledger.published_twice()
    assert twice.count == published_twice, twice.cases
    return ledger
