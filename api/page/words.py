"""Numbers, sizes and durations with their units, for people."""

from datetime import datetime

from markupsafe import Markup

from shared.time import iso_utc

_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

_DURATIONS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def sentence(text: str) -> str:
    """Return an error text as a sentence."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def number(count: float) -> str:
    return f"{round(count):,}"


def counted(count: int, noun: str) -> str:
    """Return the number with the noun, which gets a plural s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(size_bytes: float) -> str:
    """Return a size in decimal units, to three digits."""
    amount, unit = float(size_bytes), 0
    # 999.5 would be rounded to 1000.
    while amount >= 999.5 and unit < len(_SIZE_UNITS) - 1:
        amount /= 1000
        unit += 1
    return f"{_three_digits(amount) if unit else round(amount)} {_SIZE_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    if seconds < 0.9995:
        return f"{round(1000 * seconds)} ms"
    if seconds < 59.95:
        return f"{_three_digits(seconds) if seconds < 9.95 else round(seconds)} s"
    rest = round(seconds)
    words: list[str] = []
    for unit_seconds, unit in _DURATIONS:
        count, rest = divmod(rest, unit_seconds)
        if count or words:
            words.append(f"{count} {unit}" if count else "")
        if len(words) == 2:
            break
    return " ".join(filter(None, words))


def moment(when: datetime) -> Markup:
    """Return an HTML element, which the script shows in the viewer's zone."""
    utc = iso_utc(when)
    shown = f"{utc[:10]} {utc[11:19]} UTC"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(utc, shown, shown)


def brief_moment(when: datetime) -> Markup:
    """Return the same without seconds."""
    utc = iso_utc(when)
    shown = f"{utc[:10]} {utc[11:16]} UTC"
    return Markup('<time datetime="{}" title="{}" data-brief>{}</time>').format(utc, shown, shown)


def _three_digits(amount: float) -> str:
    """Return up to three digits, without trailing zeros."""
    return f"{amount:.3g}" if amount < 100 else str(round(amount))
