"""Text that came from a model, made safe to show: nothing in it can move a cursor, break a line or reverse a text."""

from __future__ import annotations

import unicodedata
from typing import Final

_CONTROL: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str) -> str:
    r"""``text`` on one line: white space collapsed to blanks, control and format characters as ``\xNN`` escapes."""
    return "".join(_escape(c) if unicodedata.category(c) in _CONTROL else c for c in " ".join(text.split()))


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
