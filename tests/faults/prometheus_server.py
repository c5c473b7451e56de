"""A real Prometheus, with Stowgate's rules on a clock in which a second stands for a minute."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml
from engines import NotToBeHad, install_debian_package, lasting_port, program, start_process
from service import wait_for

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "stowgate.rules.yml"

# A payload that is pending for ten minutes, in seconds.
_OLDEST_PENDING = "stowgate_oldest_pending_seconds) > 600"


def quick_rules(rules: str) -> str:
    """Return the rules with each minute as a second, and each hour as a minute."""
    assert _OLDEST_PENDING in rules
    rules = rules.replace(_OLDEST_PENDING, _OLDEST_PENDING.replace("600", "10"))
    rules = re.sub(r"\[(\d+)m\]", r"[\1s]", rules)
    rules = re.sub(r"for: (\d+)m", r"for: \1s", rules)
    return re.sub(r"\[(\d+)h\]", r"[\1m]", rules)


class Prometheus:
    """Scrapes the services given to `scrape`, once a second."""

    def __init__(self, folder: Path, url: str) -> None:
        self._targets = folder / "targets.json"
        self._url = url
        self._scraped: dict[str, str] = {}

    def scrape(self, **jobs: str) -> None:
        """Scrape these URLs too, by the name of the job."""
        for job, url in jobs.items():
            self._scraped[url] = job
        groups = [
            {
                "targets": [urlsplit(url).netloc],
                "labels": {
                    "job": f"stowgate-{job.partition('_')[0]}",
                    "__scheme__": urlsplit(url).scheme,
                },
            }
            for url, job in self._scraped.items()
        ]
        written = self._targets.with_suffix(".new")
        written.write_text(json.dumps(groups))
        written.replace(self._targets)
        wait_for(lambda: len(self.query("up == 1")) == len(self._scraped))

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def firing(self) -> set[str]:
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def fires(self, *names: str, seconds: float = 40.0) -> None:
        """Wait until these alerts fire."""
        try:
            wait_for(lambda: self.firing() >= set(names), seconds, pause_seconds=0.2)
        except AssertionError as error:
            raise AssertionError(f"firing: {sorted(self.firing())}, not {names}") from error

    def quiet(self, seconds: float = 40.0) -> None:
        """Wait until no alert fires."""
        try:
            wait_for(lambda: self.firing() == set(), seconds, pause_seconds=0.2)
        except AssertionError as error:
            raise AssertionError(f"firing: {sorted(self.firing())}") from error

    def _get(self, what: str, **parameters: str) -> dict[str, Any]:
        answer = requests.get(f"{self._url}/api/v1/{what}", params=parameters, timeout=10)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["data"]
        return found


def prometheus_program() -> str:
    """Return the server's path; it is Debian's package. Raises `NotToBeHad`."""
    try:
        return program("prometheus")
    except NotToBeHad:
        install_debian_package("prometheus")
        return program("prometheus")


@contextmanager
def running_prometheus(folder: Path) -> Iterator[Prometheus]:
    server, port = prometheus_program(), lasting_port()
    folder.mkdir()
    (folder / "rules.yml").write_text(quick_rules(RULES.read_text("utf-8")))
    (folder / "targets.json").write_text("[]")
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {
                "job_name": "stowgate",
                "tls_config": {"insecure_skip_verify": True},
                "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        start_process(
            [
                server,
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            {},
            folder,
            stack,
        )
        wait_for(lambda: _is_ready(url))
        yield Prometheus(folder, url)


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=1).ok
    except requests.RequestException:
        return False
