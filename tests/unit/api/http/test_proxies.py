"""Whose address counts behind proxies."""

from ipaddress import ip_network

import pytest

from api.http.paths import own_path
from api.http.proxies import sender_behind

KNOWN = [ip_network(known) for known in ("10.0.0.0/8", "192.0.2.1", "fd00::/64")]


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "sender"),
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
def test_the_sender_is_the_first_that_is_no_known_proxy(
    peer: str, forwarded_for: str, sender: str
) -> None:
    assert sender_behind(peer, forwarded_for, KNOWN) == sender


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("/dicomweb/studies", "/dicomweb/studies"),
        ("/site/stow/dicomweb/studies", "/dicomweb/studies"),
        ("//site//stow//dicomweb//studies/", "/dicomweb/studies"),
        ("/site/stow", "/"),
        ("/site/dicomweb/studies", "/site/dicomweb/studies"),
        ("/site/stowaway/studies", "/site/stowaway/studies"),
        ("/dicomweb/site/stow/studies", "/dicomweb/site/stow/studies"),
        ("/site/stow/config/vae", "/config/vae"),
        ("/site/stow//config/vae/", "//config/vae/"),
        ("//site/stow/config/vae", "//site/stow/config/vae"),
    ],
)
def test_a_prefix_is_taken_away_where_a_path_begins_with_it(path: str, own: str) -> None:
    assert own_path(path, "/site/stow") == own
