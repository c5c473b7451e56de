"""Paths behind a proxy that serves the API under a prefix."""

import pytest

from api.http.paths import own_path


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
def test_the_prefix_of_the_public_url_is_removed_from_a_path(path: str, own: str) -> None:
    assert own_path(path, "/site/stow") == own
