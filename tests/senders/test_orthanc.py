"""Orthanc as the sender: the STOW-RS client of its DICOMweb plug-in."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from engines import lasting_port, start_process, temporary_folder
from instances import new_instance
from service import Service, wait_for
from snippets import snippet

ORTHANCS_ADDRESS = "http://127.0.0.1:8042"

# A client that is installed first is a fixture, and may take minutes.
pytestmark = pytest.mark.timeout(180, func_only=True)


@dataclass
class Orthanc:
    url: str

    def ask(self, path: str, **arguments: Any) -> Any:
        method = "POST" if arguments else "GET"
        answer = requests.request(method, self.url + path, timeout=60, **arguments)
        answer.raise_for_status()
        return answer.json()

    def hold(self, *instances: bytes) -> list[str]:
        """Their ids in it."""
        return [self.ask("/instances", data=instance)["ID"] for instance in instances]

    def store(self, server: str, ids: list[str], **options: Any) -> Any:
        return self.ask(f"/dicom-web/servers/{server}/stow", json={"Resources": ids, **options})

    def finished(self, job: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.ask(f"/jobs/{job}")
            return found if found["State"] not in ("Pending", "Running") else None

        return wait_for(look)


@pytest.fixture(scope="module")
def sender(orthanc: Path, stowgate: Service) -> Iterator[Orthanc]:
    """With a server for all, one that it sends to without chunks, and one that takes MR only."""
    vae = {"virtualAeTitle": "ORTHANC-MR", "workflows": ["w"], "acceptedModalities": ["MR"]}
    assert requests.post(f"{stowgate.url}/config/vae", json=vae, timeout=60).ok
    with ExitStack() as stack:
        # Its tests may come in several turns, each with a fixture of its own.
        stack.callback(requests.delete, f"{stowgate.url}/config/vae/ORTHANC-MR", timeout=60)
        folder, port = temporary_folder(stack), lasting_port()
        configuration = json.loads(snippet("Orthanc", "json", url=stowgate.url))
        configuration["DicomWeb"]["Servers"] |= {
            "without-chunks": {"Url": f"{stowgate.url}/dicomweb/", "ChunkedTransfers": False},
            "mr-only": [f"{stowgate.url}/dicomweb/vae/ORTHANC-MR/"],
        }
        configuration |= {
            "StorageDirectory": str(folder / "storage"),
            "HttpPort": port,
            "DicomServerEnabled": False,
        }
        (folder / "orthanc.json").write_text(json.dumps(configuration))
        alive = start_process([str(orthanc), str(folder / "orthanc.json")], {}, folder, stack)
        sender = Orthanc(f"http://127.0.0.1:{port}")

        def answers() -> bool:
            assert alive(), (folder / "output").read_text()
            try:
                return bool(sender.ask("/system"))
            except requests.ConnectionError:
                return False

        wait_for(answers)
        yield sender


def payloads(stowgate: Service, instances: list[bytes]) -> set[str]:
    return set.union(*map(stowgate.payloads_with, instances))


@pytest.mark.parametrize(
    ("server", "count"), [("stowgate", 1), ("stowgate", 12), ("without-chunks", 12)]
)
def test_a_job_ends_in_success_and_counts_what_was_stored_as_one_payload(
    sender: Orthanc, stowgate: Service, server: str, count: int
) -> None:
    instances = [new_instance("MR_small.dcm") for _ in range(count)]

    job = sender.store(server, sender.hold(*instances), Synchronous=False)
    finished = sender.finished(job["ID"])

    assert finished["State"] == "Success", finished
    assert finished["Content"]["InstancesCount"] == str(count)
    (payload,) = payloads(stowgate, instances)
    assert stowgate.opened(payload)["file_count"] == count


def test_one_who_waits_for_it_gets_the_count(sender: Orthanc, stowgate: Service) -> None:
    instances = [new_instance(), new_instance("examples_palette.dcm")]

    answer = sender.store("stowgate", sender.hold(*instances), Synchronous=True)

    assert answer["InstancesCount"] == "2"
    assert len(payloads(stowgate, instances)) == 1


def test_a_job_fails_where_an_instance_was_not_stored(sender: Orthanc, stowgate: Service) -> None:
    taken, refused = new_instance("MR_small.dcm"), new_instance("CT_small.dcm")

    job = sender.store("mr-only", sender.hold(taken, refused), Synchronous=False)

    assert sender.finished(job["ID"])["State"] == "Failure"
    assert len(stowgate.payloads_with(taken)) == 1
    assert not stowgate.payloads_with(refused)


def test_all_studies_are_stored_as_one_job(
    sender: Orthanc, stowgate: Service, curl: Path, desk: Path
) -> None:
    instance = (desk / "image.dcm").read_bytes()
    sender.hold(instance)
    code = snippet("Orthanc", "sh", url=stowgate.url).replace(ORTHANCS_ADDRESS, sender.url)

    done = subprocess.run(
        ["/bin/sh", "-c", code.replace("curl", str(curl))],
        capture_output=True,
        timeout=60,
        check=True,
    )
    finished = sender.finished(json.loads(done.stdout)["ID"])

    assert finished["State"] == "Success", finished
    (payload,) = stowgate.payloads_with(instance)
    assert stowgate.opened(payload)["file_count"] == int(finished["Content"]["InstancesCount"])
