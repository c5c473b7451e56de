"""Senders of the shell: curl and `stowgate send`."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from instances import new_instance
from service import STOWGATE, Service
from snippets import snippet

ONE = ["-H", "Content-Type: application/dicom", "--data-binary", "@image.dcm"]
MANY = [
    *["-H", 'Content-Type: multipart/related; type="application/dicom"'],
    *["-F", "file=@image.dcm;type=application/dicom"],
    *["-F", "file=@series/0.dcm;type=application/dicom"],
]


def _curl(
    curl: Path, desk: Path, stowgate: Service, *arguments: str
) -> tuple[int, dict[str, str], bytes, str]:
    """Status and headers of the last answer, its body, and what curl told of the exchange."""
    done = subprocess.run(
        [curl, "-v", "--silent", "--show-error", *arguments, f"{stowgate.url}/dicomweb/studies"],
        cwd=desk,
        capture_output=True,
        timeout=60,
        check=True,
    )
    told = done.stderr.decode("latin-1")
    statuses = re.findall(r"^< HTTP/1\.[01] (\d{3})", told, re.MULTILINE)
    headers = dict(re.findall(r"^< ([^:\r]+): ([^\r]*)\r$", told, re.MULTILINE))
    return int(statuses[-1]), headers, done.stdout, told


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        pytest.param(ONE, 1, id="one"),
        pytest.param(MANY, 2, id="many"),
        pytest.param([*ONE, "--http1.0"], 1, id="one by HTTP/1.0"),
        pytest.param([*MANY, "--http1.0"], 2, id="many by HTTP/1.0"),
        pytest.param([*ONE, "-H", "Transfer-Encoding: chunked"], 1, id="one in chunks"),
        pytest.param([*MANY, "-H", "Transfer-Encoding: chunked"], 2, id="many in chunks"),
    ],
)
def test_curl_stores_one_and_many(
    curl: Path, stowgate: Service, desk: Path, arguments: list[str], count: int
) -> None:
    status, headers, body, _ = _curl(curl, desk, stowgate, *arguments)

    assert status == 200
    assert len(json.loads(body)["00081199"]["Value"]) == count
    assert stowgate.opened(headers["X-Payload-ID"])["file_count"] == count


@pytest.mark.parametrize("arguments", [ONE, MANY], ids=["one", "many"])
def test_curl_is_told_to_go_on_when_it_asks_before_it_sends_the_body(
    curl: Path, stowgate: Service, desk: Path, arguments: list[str]
) -> None:
    status, _, _, told = _curl(curl, desk, stowgate, *arguments, "-H", "Expect: 100-continue")

    assert re.findall(r"^< HTTP/1\.1 (\d{3})", told, re.MULTILINE) == ["100", "200"]
    assert status == 200


def test_curl_asks_so_by_itself_before_a_large_body(
    curl: Path, stowgate: Service, desk: Path
) -> None:
    (desk / "image.dcm").write_bytes(new_instance(PixelData=bytes(2 << 20)))

    status, _, _, told = _curl(curl, desk, stowgate, *ONE)

    assert "< HTTP/1.1 100 Continue" in told
    assert status == 200


def test_curl_that_sends_a_form_is_told_what_would_be_taken(
    curl: Path, stowgate: Service, desk: Path
) -> None:
    status, headers, body, _ = _curl(curl, desk, stowgate, "-F", "file=@image.dcm")

    assert (status, body) == (415, b"")
    assert (
        headers["Accept-Post"] == 'application/dicom, multipart/related; type="application/dicom"'
    )


def test_curl_that_leaves_line_ends_and_nuls_out_is_told_that_the_preamble_is_missing(
    curl: Path, stowgate: Service, desk: Path
) -> None:
    status, _, body, _ = _curl(
        curl, desk, stowgate, "-H", "Content-Type: application/dicom", "-d", "@image.dcm"
    )

    assert status == 409
    (failed,) = json.loads(body)["0008119A"]["Value"]
    (words,) = failed["00091001"]["Value"]
    assert words.startswith("part 1: no DICOM preamble")


def _pasted(code: str, desk: Path) -> str:
    path = f"{STOWGATE.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", code],
        cwd=desk,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("curl")
def test_the_snippets_for_curl_store_the_image_and_the_series(
    stowgate: Service, desk: Path
) -> None:
    one = json.loads(_pasted(snippet("curl", "sh", 1, url=stowgate.url), desk))
    many = json.loads(_pasted(snippet("curl", "sh", 2, url=stowgate.url), desk))

    assert [len(dataset["00081199"]["Value"]) for dataset in (one, many)] == [1, 3]


def test_the_snippet_for_stowgate_send_stores_the_image_and_the_series(
    stowgate: Service, desk: Path
) -> None:
    told = _pasted(snippet("stowgate send", "sh", url=stowgate.url), desk)

    assert told.startswith("stored 4 of 4 files\n")


def test_the_snippet_for_stowgate_send_with_a_key_sends_the_series_once_more(
    stowgate: Service, desk: Path
) -> None:
    first = _pasted(f"stowgate send series --url {stowgate.url}", desk)
    told = _pasted(snippet("stowgate send", "sh", 2, url=stowgate.url), desk)

    assert told.startswith("stored 3 of 3 files\n")
    assert told != first
