"""The address of a client, also behind proxies."""

from ipaddress import ip_network

import pytest

from api.http.client_address import address_of, client_behind

TRUSTED = [ip_network(trusted) for trusted in ("10.0.0.0/8", "192.0.2.1", "fd00::/64")]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_an_address_is_the_same_on_ipv4_and_dual_stack_sockets(text: str, address: str) -> None:
    assert str(address_of(text)) == address


@pytest.mark.parametrize("text", [None, "", "unix:", "192.0.2", "evil\nline"])
def test_an_invalid_address_is_none(text: str | None) -> None:
    assert address_of(text) is None


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("198.51.100.7", "203.0.113.9", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9,198.51.100.7 , 192.0.2.1", "198.51.100.7"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("fd00::1", "2001:db8::7", "2001:db8::7"),
        ("::ffff:10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", "[2001:db8::7]:4711", "2001:db8::7"),
        ("10.0.0.1", "203.0.113.9, unknown", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.9, ", "10.0.0.1"),
        ("", "198.51.100.7", ""),
    ],
)
def test_the_client_is_the_last_untrusted_address(
    peer: str, forwarded_for: str, client: str
) -> None:
    assert client_behind(peer, forwarded_for, TRUSTED) == client
