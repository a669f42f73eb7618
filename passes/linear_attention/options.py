"""What the options of linear attention may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fxopt.errors import OptionError
from fxopt.passes.linear_attention.meaning import DROPPABLE
from fxopt.rewriter.settings import check_texts


def check_side(name: str, value: object) -> None:
    """Refuse what is no side of a filter.

    Raises:
        OptionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise OptionError(f"{name}={value!r} is not possible; give an odd side, such as 5, a whole number")


def read_names(name: str, value: object) -> tuple[str, ...]:
    """One name, or several, as a tuple.

    Raises:
        OptionError: it is neither.
    """
    check_texts(name, value, "one name")
    return (value,) if isinstance(value, str) else tuple(cast(Sequence[str], value))


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
