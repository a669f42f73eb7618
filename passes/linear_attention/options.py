"""What the options of linear attention may be."""

from __future__ import annotations

import math
from typing import TypeGuard

from fxopt.errors import OptionError
from fxopt.passes.linear_attention.meaning import DROPPABLE


def check_count(name: str, value: object, what: str = "0 or more") -> None:
    """Refuse what is no whole number of 0 or more; ``what`` says in words what to give.

    Raises:
        OptionError: it is another.
    """
    if not _is_whole(value) or value < 0:
        raise OptionError(f"{name}={value!r} is not possible; give {what}, a whole number")


def check_side(name: str, value: object) -> None:
    """Refuse what is no side of a filter.

    Raises:
        OptionError: it is none.
    """
    if not _is_whole(value) or value < 1 or value % 2 == 0:
        raise OptionError(f"{name}={value!r} is not possible; give an odd side, such as 5, a whole number")


def check_positive(name: str, value: object) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        OptionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OptionError(f"{name}={value!r} is not possible; give a number above 0")


def read_names(name: str, value: object) -> tuple[str, ...]:
    """One name, or several, as a tuple.

    Raises:
        OptionError: it is neither.
    """
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(each, str) for each in names):
        raise OptionError(f"{name}={value!r} is not possible; give one name, or a tuple of them")
    return tuple(names)


def read_drop(drop: object) -> tuple[str, ...]:
    """The option ``drop`` as a tuple.

    Raises:
        OptionError: it names something else.
    """
    names = read_names("drop", drop)
    for name in names:
        if name not in DROPPABLE:
            raise OptionError(f"drop={name!r} is not possible; what can be given up: {', '.join(DROPPABLE)}")
    return names


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
