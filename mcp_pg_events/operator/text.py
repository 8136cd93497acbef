"""Text for a terminal: what somebody else wrote, made fit for it, and numbers of things.

Ids, owners and payloads come from clients and servers. An escape sequence in one could rewrite what an operator sees,
or what their terminal does next; so every character that cannot be printed is shown by its number. Next: `cli/`.
"""

from __future__ import annotations

__all__ = ["counted", "plain", "shortened"]


def plain(text: str) -> str:
    """`text` on one line, with every control, formatting and unassigned character as a Python escape."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def shortened(text: str, length: int) -> str:
    """`plain(text)`, cut to `length` characters with an ellipsis in the end."""
    # Escaping makes it longer, so what is far beyond the cut need not be looked at.
    shown = plain(text[: length + 1])
    return shown if len(shown) <= length and len(text) <= length else shown[: max(length - 1, 0)] + "…"


def counted(number: int, noun: str) -> str:
    """`1 call`, `2 calls`: so many of what `noun` is one of."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
