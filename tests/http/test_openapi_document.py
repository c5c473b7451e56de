"""The OpenAPI document against the API that it describes."""

import os
import subprocess
import sys
from pathlib import Path

import requests
from instances import real_file
from service import running

HERE = Path(__file__).parent


def test_the_api_does_what_its_openapi_document_says(tmp_path: Path) -> None:
    with running("run", tmp_path / "data") as stowgate:
        vae = requests.post(
            f"{stowgate.url}/config/vae", json={"virtualAeTitle": "EXISTING"}, timeout=30
        )
        stored = stowgate.post("/dicomweb/studies", real_file(), "application/dicom")
        stowgate.opened(stored.headers["X-Payload-ID"])
        command = (
            *(Path(sys.executable).with_name("schemathesis"), "--config-file"),
            *(HERE / "schemathesis.toml", "run", "--no-color", f"{stowgate.url}/openapi.json"),
        )
        found = subprocess.run(
            command,
            env={
                **os.environ,
                "EXISTING_PAYLOAD": stored.headers["X-Payload-ID"],
                "EXISTING_VAE": vae.json()["name"],
                "PYTHONPATH": str(HERE.parent),
                "SCHEMATHESIS_HOOKS": str(HERE / "schemathesis_bodies.py"),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    assert found.returncode == 0, found.stdout + found.stderr
