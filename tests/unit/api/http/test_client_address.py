"""The address of a sender."""

import pytest

from api.http.client_address import address_of


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_a_sender_has_one_address_whatever_socket_it_came_to(text: str, address: str) -> None:
    assert str(address_of(text)) == address


@pytest.mark.parametrize("text", [None, "", "unix:", "192.0.2", "evil\nline"])
def test_what_is_no_address_is_none(text: str | None) -> None:
    assert address_of(text) is None
