"""The texts that the operator's commands print."""

import pytest

from cli.terminal import duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5.0, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60.0, "1 min"),
        (3599.0, "59 min"),
        (3600.0, "1 h"),
        (86399.0, "23 h"),
        (86400.0, "1 d"),
        (400 * 86400.0, "400 d"),
    ],
)
def test_a_duration_has_its_largest_unit(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
