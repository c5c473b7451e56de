"""The sender's address for the Workflow Manager: 1 to 15 characters."""

import pytest

from api.stow.view import source_of


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.168.100.200", "192.168.100.200"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("", "unknown"),
        (None, "unknown"),
        ("unix:", "unknown"),
    ],
)
def test_a_short_address_is_unchanged(address: str | None, source: str) -> None:
    assert source_of(address) == source


def test_a_long_ipv6_address_is_replaced_by_a_digest() -> None:
    one = source_of("2001:db8:85a3::8a2e:370:7334")
    again = source_of("2001:0db8:85a3:0000:0000:8a2e:0370:7334")
    other = source_of("2001:db8:85a3::8a2e:370:7335")

    assert one == again != other
    assert len(one) == 15
