"""Names from a model on their way into files: identifiers of generated code and file names."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from typing import Final

_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST: Final = 80


def is_identifier(name: str) -> bool:
    """Whether ``name`` is an ASCII identifier and no keyword."""
    return bool(_IDENTIFIER.fullmatch(name)) and not keyword.iskeyword(name)


class Names:
    """Gives each thing an identifier of its own: the wanted one where it is valid and free, else a numbered one."""

    def __init__(self, reserved: Iterable[str]) -> None:
        self._taken = set(reserved)

    def add(self, wanted: str, fallback: str) -> str:
        """Reserve ``wanted``, or ``fallback_<number>`` where that is no identifier or taken."""
        name, number = wanted, 0
        while not is_identifier(name) or name in self._taken:
            name, number = f"{fallback}_{number}", number + 1
        self._taken.add(name)
        return name


def file_name(wanted: str, taken: Iterable[str] = ()) -> str:
    """``wanted`` as a file name without suffix: ASCII letters, digits, ``._-``, no leading dot, none of ``taken``."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip(".-")[:_LONGEST] or "unnamed"
    used, name, number = set(taken), stem, 1
    while name in used:
        number += 1
        name = f"{stem}-{number}"
    return name
