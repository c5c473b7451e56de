"""Instances that are on their way into the store while they arrive."""

import socket
import struct
from collections.abc import Iterator

from instances import multipart, new_instance
from reconciliation import reconcile
from stowgate_site import Site, study
from wire import connect, head

MIB = 1 << 20
FIRST_PART = rb"PUT [^ ]*[?&]partNumber=1&"


def test_a_large_instance_is_uploaded_while_it_arrives(
    site: Site,
) -> None:
    api, _ = site.pair()
    instance = new_instance(PixelData=bytes(range(256)) * (40 * MIB // 256))
    body, _ = multipart(instance)
    first_part = api.store.hold(FIRST_PART)

    def pieces() -> Iterator[bytes]:
        yield body[: 24 * MIB]
        first_part.wait_reached()
        first_part.release()
        yield body[24 * MIB :]

    answer = site.post(api, [instance], pieces=pieces())

    assert answer.status_code == 200
    site.opened(answer.headers["X-Payload-ID"])
    reconcile(site)


def test_a_sender_that_disconnects_during_a_large_instance_leaves_no_parts(
    site: Site,
) -> None:
    api, _ = site.pair()
    instance = new_instance(PixelData=bytes(40 * MIB))
    first_part = api.store.hold(FIRST_PART)
    abandoned = api.store.hold_answer(rb"DELETE [^ ]*[?&]uploadId=")
    with connect(api.service) as connection:
        connection.sendall(
            head(
                "POST /dicomweb/studies HTTP/1.1",
                "Content-Type: application/dicom",
                f"Content-Length: {len(instance)}",
            )
        )
        connection.sendall(instance[: 24 * MIB])
        first_part.wait_reached()
        first_part.release()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    abandoned.wait_reached()
    abandoned.release()

    assert site.post(api, study()).status_code == 200
    reconcile(site)
