"""Settings from environment variables, or from files named by variables with the suffix `_FILE`.

Each setting is declared once, in the section of the process that reads it. A test compares the
README's tables with these declarations.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from environs import EnvError, FileAwareEnv

from shared.settings.parsers import without_password

_PREFIX = "STOWGATE_"
_TEST_PREFIX = "STOWGATE_TEST_"
_FILE = "_FILE"


class BadSetting(ValueError):
    """A setting is not valid. The text is one line: variable, value unless secret, and remedy."""


def setting(
    default: str | None, parse: Callable[[str], Any], doc: str, *, secret: bool = False
) -> Any:
    """Declare a setting; the field's name is the variable's, lower case and without the prefix."""
    return dataclasses.field(
        metadata={"default": default, "parse": parse, "doc": doc, "secret": secret}
    )


@dataclass(frozen=True)
class SettingsSection:
    """Base class of sections."""

    files: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)
    """The files that these settings were read from, by name."""

    def current(self, name: str) -> Callable[[], str]:
        """Return a function that reads a text setting again from its file, if a file holds it.

        The function raises `OSError` if the file cannot be read.
        """
        path, text = self.files.get(name), getattr(self, name) or ""
        return (lambda: text) if path is None else (lambda: path.read_text("utf-8").strip())

    def validate(self) -> None:
        """Raise `BadSetting` if settings contradict each other."""


Section = TypeVar("Section", bound=SettingsSection)


class Declared(NamedTuple):
    """The documentation of a setting; `default` is None if there is none."""

    variable: str
    default: str | None
    doc: str


def declared(section: type[SettingsSection]) -> list[Declared]:
    """Return the settings of a section, including inherited ones."""
    return [
        Declared(_variable(f), f.metadata["default"], f.metadata["doc"])
        for f in _setting_fields(section)
    ]


def numbers(settings: SettingsSection) -> list[tuple[str, int]]:
    """Return variable and value of each setting that is a number and is set."""
    values = ((_variable(f), getattr(settings, f.name)) for f in _setting_fields(type(settings)))
    return [(name, value) for name, value in values if type(value) is int]


def _setting_fields(section: type[SettingsSection]) -> list["dataclasses.Field[Any]"]:
    return [field for field in dataclasses.fields(section) if "parse" in field.metadata]


def load(section: type[Section]) -> Section:
    """Read a section from the environment. Raises `BadSetting` at the first invalid value."""
    env = FileAwareEnv(strip_whitespace=True)
    fields = _setting_fields(section)
    files = {
        f.name: Path(file).absolute()
        for f in fields
        if (file := os.environ.get(_variable(f) + _FILE))
    }
    settings = section(**{f.name: _value(f, env) for f in fields}, files=files)
    settings.validate()
    return settings


def _value(field: "dataclasses.Field[Any]", env: FileAwareEnv) -> Any:
    variable, spec = _variable(field), field.metadata
    try:
        raw = env.str(variable, None)
    except (EnvError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        why = cause.strerror if isinstance(cause, OSError) else "it is not UTF-8"
        # An operator who confuses the two variables puts the secret itself into this one.
        shown = "" if spec["secret"] else f"is {os.environ[variable + _FILE]!r}, but "
        raise BadSetting(f"{variable}{_FILE} {shown}must name a readable file: {why}") from error
    raw = spec["default"] if raw is None or raw == "" else raw
    try:
        return None if raw is None else spec["parse"](raw)
    except ValueError as error:
        # An operator may put a password into a URL where none belongs.
        shown = "(a secret)" if spec["secret"] else repr(without_password(raw))
        raise BadSetting(f"{variable} is {shown}, but must be {error}") from None


def doubtful_variables(
    environ: Mapping[str, str], sections: Iterable[type[SettingsSection]]
) -> list[str]:
    """Return a sentence for each `STOWGATE_` variable that has no effect: no section reads it, such
    as a typo, or a file takes its place."""
    variables = [d.variable for section in sections for d in declared(section)]
    known = variables + [name + _FILE for name in variables]
    words = [name.removeprefix(_PREFIX) for name in known]
    sentences = [
        f"{name} and {name}{_FILE} are both set: the file is used, and {name} is ignored; remove "
        "one of them"
        for name in sorted(set(variables))
        if environ.get(name) and environ.get(name + _FILE)
    ]
    for name in sorted(environ):
        if name.startswith(_PREFIX) and not name.startswith(_TEST_PREFIX) and name not in known:
            near = difflib.get_close_matches(name.removeprefix(_PREFIX), words, n=1)
            hint = f"; did you mean {_PREFIX}{near[0]}?" if near else ""
            sentences.append(f"{name} is set, but no setting has that name{hint}")
    return sentences


def _variable(field: "dataclasses.Field[Any]") -> str:
    return _PREFIX + field.name.upper()
