"""A short run of the fuzzer, and proof that it reports planted defects."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import mutations
import pytest
import run
from targets import Events, Finding, Instances, Target, all_targets, check_dicom_json

FUZZER = Path(run.__file__)
SEED = 1


def findings(target: Target, cases: int = 300) -> list[str]:
    return [defect.message for defect in run.run_cases(target, SEED, range(cases)).defects]


def fuzz(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FUZZER), *arguments],
        cwd=folder,
        env={"PYTHONPATH": f"{FUZZER.parents[2]}:{FUZZER.parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    ran = fuzz("--cases", "4000", "--seed", str(SEED), folder=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"SEED={SEED}" in ran.stdout


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_each_target_accepts_some_of_its_cases_and_repeats_them_by_seed(target: Target) -> None:
    tally = run.run_cases(target, SEED, range(200))
    assert tally.accepted > 0
    for number in range(50):
        case = run.Case(target.name, SEED, number)
        assert case.make(target) == case.make(target)


class Planted(Events):
    """Replace the tested code of a real target with a defect."""

    def run(self, data: bytes) -> Any:
        raise NotImplementedError


class WrongException(Planted):
    def run(self, data: bytes) -> Any:
        empty: dict[int, Any] = {}
        return empty[len(data)]


class NeverEnding(Planted):
    def run(self, data: bytes) -> Any:  # noqa: ARG002
        while True:
            try:
                sum(range(1000))
            except Exception:  # noqa: BLE001 - a defect may do this
                continue


class Greedy(Planted):
    def run(self, data: bytes) -> Any:  # noqa: ARG002
        bytearray(b"x") * (run.peak_bytes() + 2 * run.MAX_CASE_MEMORY_BYTES)


def test_an_exception_of_another_type_is_a_finding() -> None:
    assert findings(WrongException(), cases=1)[0].startswith("KeyError")


def test_too_much_processor_time_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_CASE_SECONDS", 0.05)
    assert findings(NeverEnding(), cases=1)[0].startswith("OverTime")


def test_too_much_memory_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    # The target must exceed the earlier peak of this process, which takes time after other tests.
    monkeypatch.setattr(run, "MAX_CASE_SECONDS", 60.0)
    assert findings(Greedy(), cases=1)[0].startswith("MemoryError: the peak grew")


class OtherUids(Instances):
    def run(self, data: bytes) -> Any:
        found = super().run(data)
        if found is None:
            return None
        identity = found.identity.__class__(
            *("1.2.3", "1.2.4", "1.2.5", "1.2.6"), found.identity.transfer_syntax_uid
        )
        return found._replace(identity=identity)


class AcceptingAll(Instances):
    def run(self, data: bytes) -> Any:
        return super().run(data) or super().run(mutations.seeds()[0].data)


class OtherSidecar(Instances):
    def run(self, data: bytes) -> Any:
        found = super().run(data)
        return found and found._replace(sidecar=b'{"00080018": {"vr": "UI", "Value": [""]}}')


@pytest.mark.parametrize("kind", [OtherUids, AcceptingAll, OtherSidecar])
def test_accepting_what_pydicom_reads_differently_is_a_finding(kind: type[Instances]) -> None:
    assert findings(kind("damaged files", 0, mutations.damaged_file), cases=50)


@pytest.mark.parametrize(
    "element",
    [
        {"vr": "XX"},
        {"vr": "LO", "Value": []},
        {"vr": "LO", "Value": [None]},
        {"vr": "LO", "Value": [1]},
        {"vr": "LO", "Value": "text"},
        {"vr": "US", "Value": ["1"]},
        {"vr": "US", "Value": [1.5]},
        {"vr": "US", "Value": [True]},
        {"vr": "PN", "Value": ["Doe^Jane"]},
        {"vr": "PN", "Value": [{}]},
        {"vr": "AT", "Value": ["(0010,0010)"]},
        {"vr": "OB", "InlineBinary": "no base64"},
        {"vr": "LO", "InlineBinary": "AAAA"},
        {"vr": "LO", "Value": ["x"], "BulkDataURI": "x"},
        {"vr": "SQ", "Value": [{"1": {"vr": "LO"}}]},
        {"vr": "SQ", "Value": [{"00100020": {"vr": "LO"}, "00100010": {"vr": "PN"}}]},
    ],
    ids=json.dumps,
)
def test_invalid_dicom_json_is_a_finding_and_valid_dicom_json_is_not(element: Any) -> None:
    with pytest.raises(Finding):
        check_dicom_json({"00081140": element})
    check_dicom_json(
        {
            "00081140": {"vr": "SQ", "Value": [{}, {"00100010": {"vr": "PN"}}]},
            "00091001": {"vr": "OB", "InlineBinary": "AAAA"},
            "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}, None]},
            "00280010": {"vr": "US", "Value": [1]},
        }
    )


def test_a_finding_saves_its_input_and_can_be_rerun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = WrongException()
    tally = run.run_cases(planted, SEED, [7])
    monkeypatch.setattr(run, "FINDINGS_FOLDER", tmp_path)
    run.report({planted.name: tally}, 1.0)

    (saved,) = tmp_path.iterdir()
    assert str(saved) in capsys.readouterr().out
    assert saved.read_bytes() == run.Case(planted.name, SEED, 7).make(planted)
    monkeypatch.setattr(run, "all_targets", lambda: [planted])
    for again in (
        ["--case", f"{planted.name}:7", "--seed", str(SEED)],
        ["--target", planted.name, str(saved)],
    ):
        assert run.main(again) == 1
        assert "KeyError" in capsys.readouterr().out


def test_generated_inputs_depend_on_the_seed_only() -> None:
    for make in (mutations.damaged_file, mutations.made_up_file, mutations.deflated_file):
        assert make(random.Random("a")) == make(random.Random("a"))
        assert make(random.Random("a")) != make(random.Random("b"))
