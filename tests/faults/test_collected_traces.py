"""The trace of a payload over API, RabbitMQ and worker, as a real collector receives it."""

import json
from collections.abc import Iterator

import pytest
from collector import Collector, Span, collecting, drawn
from engines import MISSING, NotToBeHad
from service import wait_for
from stowgate_site import Node, Site, publish_to, study

# The first test builds the collector.
pytestmark = pytest.mark.timeout(1500)

STORE = "POST /dicomweb/studies"


@pytest.fixture(scope="module")
def collector(request: pytest.FixtureRequest) -> Iterator[Collector]:
    """Built by Go, which not every machine has."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")

    def say(line: str) -> None:
        if terminal is not None:
            terminal.write_line(f"collector: {line}")

    try:
        with collecting(say) as found:
            yield found
    except NotToBeHad as why:
        pytest.skip(f"{MISSING}OpenTelemetry's collector: {why}")


def _variables(collector: Collector) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


def _names(site: Site) -> tuple[str, str, str]:
    """The spans of the event, of its handling and of the request; names begin with the site's."""
    event = f"{site.events}:instances-stored"
    return (
        f"publish {event}",
        f"process {event}:{site.event_queue}",
        f"publish {site.name}:md.workflow.request",
    )


def _trace(collector: Collector, api: Node, payload_id: str, *names: str) -> list[Span]:
    """The payload's trace, once the POST's span and those of these names have arrived."""
    trace_id = api.service.get(f"/payloads/{payload_id}").json()["trace_id"]

    def look() -> list[Span] | None:
        spans = collector.trace(trace_id)
        return spans if {STORE, *names} <= {span.name for span in spans} else None

    return wait_for(look)


def _parents(spans: list[Span]) -> dict[str, str]:
    names = {span.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent_id, "") for span in spans}


def test_a_payload_is_one_trace_over_api_broker_and_worker(
    site: Site, collector: Collector
) -> None:
    api, worker = site.pair(**_variables(collector))
    payload_id = site.post(api, study()).headers["X-Payload-ID"]
    site.opened(payload_id)
    event, handled, request = _names(site)

    spans = _trace(collector, api, payload_id, event, handled)

    print(drawn(spans))
    assert _parents(spans) == {
        STORE: "",
        "receive instances": STORE,
        "store instances": STORE,
        "write record": STORE,
        event: STORE,
        handled: event,
        "write sidecars": handled,
        request: handled,
        "write opened record": handled,
    }
    services = {span.name: span.service for span in spans}
    assert (services[event], services[handled]) == ("stowgate-api", "stowgate-worker")
    trace_id = spans[0].trace_id
    for node in (api, worker):
        lines = [json.loads(line) for line in node.log().splitlines()]
        assert trace_id in {line.get("trace_id") for line in lines}
    with site.channel() as channel:
        _, properties, _ = channel.basic_get(site.name, auto_ack=True)
    (sent,) = [span for span in spans if span.name == request]
    assert properties is not None
    assert properties.headers is not None
    assert properties.headers["traceparent"] == f"00-{trace_id}-{sent.span_id}-01"


def test_a_worker_that_takes_over_from_a_killed_one_continues_the_trace(
    site: Site, collector: Collector
) -> None:
    api, first = site.pair(**_variables(collector))
    request = first.broker.hold(publish_to(site.name))
    payload_id = site.post(api, study()).headers["X-Payload-ID"]
    request.wait_reached()
    first.kill()
    request.drop()
    site.worker(**_variables(collector))
    site.opened(payload_id)
    event, handled, sent = _names(site)

    # The first handling never ended, so its span was never exported. The event came back, or the
    # relay of the second worker announced the record, both in the trace of the POST.
    def complete() -> tuple[list[Span], Span] | None:
        """The trace and the parent of the request, whose span ends and is exported later."""
        spans = _trace(collector, api, payload_id, event, handled, sent)
        (request_span,) = [span for span in spans if span.name == sent]
        parents = [span for span in spans if span.span_id == request_span.parent_id]
        return (spans, parents[0]) if parents else None

    spans, taken_over = wait_for(complete)
    print(drawn(spans))
    assert taken_over.name == handled
    assert taken_over.parent_id in {span.span_id for span in spans if span.name == event}
    announced = [span for span in spans if span.name == event]
    (posted,) = [span for span in spans if span.name == STORE]
    assert {span.parent_id for span in announced} == {posted.span_id}
