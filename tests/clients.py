"""Programs that send, from wherever they can be had."""

import os
import shutil
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from engines import (
    CACHE,
    NotToBeHad,
    install_debian_package,
    one_run_at_a_time,
    program,
    run_command,
)

ORTHANC_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
NPM_PACKAGES = Path(__file__).resolve().parent / "senders"
CLIENT_MISSING = "client missing: "


def had_by_one_of(client: str, *ways: Callable[[], Path]) -> Path:
    """What the first way leads to that leads anywhere. Where none does, the test is skipped, and
    named in the last lines of the run; with CI set it fails."""
    reasons = []
    for way in ways:
        try:
            return way()
        except NotToBeHad as why:
            reasons.append(str(why))
    words = f"{CLIENT_MISSING}{client}: {'; '.join(reasons)}"
    if os.environ.get("CI"):
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


def on_this_machine(name: str) -> Path:
    return Path(program(name))


def from_debian(package: str, name: str) -> Path:
    install_debian_package(package)
    return Path(program(name))


def orthanc_on_this_machine() -> Path:
    """With its DICOMweb plug-in, where Debian puts that."""
    if not ORTHANC_PLUGIN.exists():
        raise NotToBeHad(f"no {ORTHANC_PLUGIN} on this machine")
    return on_this_machine("Orthanc")


def orthanc_from_debian() -> Path:
    install_debian_package("orthanc-dicomweb")
    return orthanc_on_this_machine()


def npm_packages(npm: Path) -> Path:
    """A folder with the packages of package-lock.json in its node_modules, installed once."""
    lock = NPM_PACKAGES / "package-lock.json"
    target = CACHE / f"npm-{sha256(lock.read_bytes()).hexdigest()[:16]}"
    with one_run_at_a_time("npm"), tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if not target.exists():
            new = Path(folder) / "new"
            new.mkdir()
            for file in (NPM_PACKAGES / "package.json", lock):
                shutil.copy(file, new)
            quiet = ["--ignore-scripts", "--no-audit", "--no-fund"]
            run_command([str(npm), "ci", "--prefix", str(new), *quiet], {})
            os.replace(new, target)
    return target
