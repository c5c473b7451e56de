"""The house's rules, held against the code itself."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from api.settings import ApiSettings, UrlSettings
from cli.settings import ClientSettings
from shared.settings.loader import declared
from shared.settings.services import CommonSettings
from worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[3]
MAY_IMPORT = {
    "shared": {"shared"},
    "api": {"api", "shared"},
    "worker": {"worker", "shared"},
    "cli": {"api", "cli", "shared", "worker"},
}


def _modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_it_may(room: str) -> None:
    for path in _modules(room):
        assert _imports(path) & set(MAY_IMPORT) <= MAY_IMPORT[room], path


def test_each_file_that_is_not_code_is_in_the_package_data() -> None:
    """Otherwise it is missing in an installed package and in the image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared_data = {
        path
        for package, patterns in project["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    found = {
        path
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }

    assert found == declared_data


def test_only_adapters_import_the_engines_libraries() -> None:
    for room in MAY_IMPORT:
        for path in _modules(room):
            if "adapters" not in path.parts:
                assert not _imports(path) & {"minio", "opentelemetry", "pika"}, path


def _loaded_by(importing: str) -> set[str]:
    """The modules of a new interpreter after that statement."""
    code = f"import sys; {importing}; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(found.stdout.split())


def test_the_commands_do_not_import_prometheus_client_at_their_start() -> None:
    """It reads on import whether several processes share their metrics, which is set later."""
    assert "prometheus_client" not in _loaded_by("import cli.main")


def test_only_a_process_that_uses_s3_or_amqp_imports_their_clients() -> None:
    loaded = _loaded_by("import api.main, cli.main, cli.serve, worker.main")

    assert not loaded & {"minio", "pika"}


API_ORDER = (
    *("main", "app", "server", "page", "payloads", "stow", "vae", "auth", "admission", "settings"),
    "http",
)
"""The folders and modules of `api`. Each may import only those after it."""


def _imports_within_api(folder: str) -> set[str]:
    paths = [*(ROOT / "api" / folder).rglob("*.py"), *(ROOT / "api").glob(f"{folder}.py")]
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.split(".")[1] for name in modules if name.startswith("api.")}
    return found - {folder}


def test_the_order_has_every_folder_and_module_of_the_api() -> None:
    paths = (ROOT / "api").iterdir()
    names = {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()}

    assert names - {"__init__"} == set(API_ORDER)


@pytest.mark.parametrize("folder", API_ORDER)
def test_a_folder_of_the_api_imports_only_those_after_it(folder: str) -> None:
    assert _imports_within_api(folder) <= set(API_ORDER[API_ORDER.index(folder) + 1 :])


READERS = {
    "Both services": (CommonSettings,),
    "API": (ApiSettings, CommonSettings),
    "Worker": (WorkerSettings, CommonSettings),
    "Commands": (ClientSettings, UrlSettings),
}
"""Of each table in the README the section that it lists, without those that others list."""


@pytest.mark.parametrize("heading", READERS)
def test_the_readme_lists_the_settings_of_each_reader(heading: str) -> None:
    section, *others = READERS[heading]
    listed_elsewhere = {setting for other in others for setting in declared(other)}

    table = (ROOT / "README.md").read_text().split(f"### {heading}\n")[1].partition("\n#")[0]

    assert re.findall(r"^\| `(STOWGATE_\w+)` \| (?:`([^`]*)`|none) \| (.*) \|$", table, re.M) == [
        (setting.variable, setting.default or "", setting.doc)
        for setting in declared(section)
        if setting not in listed_elsewhere
    ]
