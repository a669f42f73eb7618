"""Checks of what users give as the settings of passes."""

from __future__ import annotations

import math
from numbers import Integral, Real

from fxopt.errors import OptionError


def check_whole(name: str, value: object, what: str, least: int = 0) -> None:
    """``value`` is a whole number of ``what``, ``least`` or more.

    Raises:
        OptionError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{name}={value!r} is not possible; give a whole number of {what}, {least} or more")


def check_number(name: str, value: object) -> None:
    """``value`` is a finite number.

    Raises:
        OptionError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise OptionError(f"{name}={value!r} is not possible; give a finite number")


def check_positive(name: str, value: object) -> None:
    """``value`` is a finite number above 0.

    Raises:
        OptionError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise OptionError(f"{name}={value!r} is not possible; give a number above 0")


def check_switch(name: str, value: object) -> None:
    """``value`` is True or False.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} is not possible; choose True or False")


def check_texts(name: str, value: object, what: str) -> None:
    """``value`` is text or a tuple or list of texts.

    Raises:
        OptionError: it is something else.
    """
    each = value if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(one, str) for one in each):
        raise OptionError(f"{name}={value!r} is not possible; give {what}, or a tuple of them")
