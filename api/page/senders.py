"""The code for senders in `docs/senders.md`, which the package has as `senders.md`."""

import re
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup, escape

ADDRESS = "http://127.0.0.1:8080"
"""The URL of Stowgate in that page."""

_SECTION = re.compile(r"^## (?P<title>.+)\n(?P<text>(?:(?!## ).*\n?)*)", re.MULTILINE)
_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(?P<code>[^`]+)`|\[(?P<text>[^\]]+)\]\([^)]+\)")


@dataclass(frozen=True)
class Block:
    """A paragraph, or code in a language."""

    html: Markup
    language: str | None = None


@dataclass(frozen=True)
class Sender:
    name: str
    blocks: tuple[Block, ...]


def senders(address: Markup) -> tuple[Sender, ...]:
    """Return the sections that come before the one on sending again.

    Args:
        address: HTML in place of the address of the documentation.
    """
    page = files("api.page").joinpath("senders.md").read_text("utf-8")
    before = page.partition("\n## Sending again")[0]
    return tuple(
        Sender(found["title"], tuple(_blocks(found["text"], address)))
        for found in _SECTION.finditer(before)
    )


def _blocks(text: str, address: Markup) -> list[Block]:
    blocks, end = [], 0
    for found in _BLOCK.finditer(text):
        blocks += _paragraphs(text[end : found.start()], address)
        code = _with_address(found["code"].rstrip("\n"), address)
        blocks.append(Block(code, found["language"]))
        end = found.end()
    return blocks + _paragraphs(text[end:], address)


def _paragraphs(text: str, address: Markup) -> list[Block]:
    paragraphs = (" ".join(lines.split()) for lines in text.split("\n\n"))
    return [Block(_inline(words, address)) for words in paragraphs if words]


def _inline(text: str, address: Markup) -> Markup:
    html, end = Markup(), 0
    for found in _INLINE.finditer(text):
        html += escape(text[end : found.start()])
        if found["code"]:
            html += Markup("<code>{}</code>").format(_with_address(found["code"], address))
        else:
            html += escape(found["text"])
        end = found.end()
    return html + escape(text[end:])


def _with_address(text: str, address: Markup) -> Markup:
    return address.join(map(escape, text.split(ADDRESS)))
