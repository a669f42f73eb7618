"""The registry of passes: ours by name, the user's by `register_pass` or the entry-point group ``fxopt.passes``."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final, TypeVar, get_args

from fxopt.errors import FxoptWarning, OptionError, UnknownPassError
from fxopt.ir.site import Tier
from fxopt.rewriter.passes import Pass

ENTRY_POINT_GROUP: Final = "fxopt.passes"
_REGISTERED: Final[dict[str, type[Pass]]] = {}

PassClass = TypeVar("PassClass", bound=type[Any])


def register_pass(pass_class: PassClass) -> PassClass:
    """Class decorator: make a pass known by its ``name``, so that it can be asked for by that name.

    Raises:
        OptionError: the class lacks part of the `Pass` contract, or the name belongs to another class.
    """
    if not isinstance(pass_class, type):
        raise OptionError(f"{pass_class!r} can't be registered: give the class of a pass")
    missing = [m for m in ("name", "tier", "requires", "run") if not hasattr(pass_class, m)]
    if missing:
        raise OptionError(f"{pass_class.__name__} is not a pass: it lacks {', '.join(missing)}")
    if pass_class.tier not in get_args(Tier):
        tiers = ", ".join(get_args(Tier))
        raise OptionError(f"{pass_class.__name__}: there is no tier {pass_class.tier!r}; choose one of {tiers}")
    known = _REGISTERED.get(pass_class.name)
    if known is not None and known.__qualname__ != pass_class.__qualname__:
        raise OptionError(f"the pass name {pass_class.name!r} belongs to {known.__module__}.{known.__qualname__}")
    _REGISTERED[pass_class.name] = pass_class
    return pass_class


def registered_passes() -> dict[str, type[Pass]]:
    """Every known pass by name, third parties' entry points included."""
    _load_entry_points()
    return dict(_REGISTERED)


def resolve_pass(wanted: str | Pass) -> Pass:
    """A pass instance from a name or an instance.

    Raises:
        UnknownPassError: no pass has that name; the message lists those that exist.
    """
    if not isinstance(wanted, str):
        if isinstance(wanted, type) or not isinstance(wanted, Pass):
            raise OptionError(f"{wanted!r} is not a pass instance; give a name or an instance such as FuseAttention()")
        return wanted
    known = registered_passes()
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UnknownPassError(f"there is no pass called {wanted!r}{hint} The passes are: {', '.join(sorted(known))}")
    needed = _required(known[wanted])
    if needed:
        raise OptionError(f"pass {wanted!r} needs {', '.join(needed)}; give {known[wanted].__name__}({needed[0]}=…)")
    return known[wanted]()


def _required(pass_class: type[Any]) -> list[str]:
    """The options without a default."""
    options = fields(pass_class) if is_dataclass(pass_class) else ()
    return [o.name for o in options if o.init and o.default is MISSING and o.default_factory is MISSING]


@cache
def _load_entry_points() -> None:
    """Register what other packages bring; one that is broken is left out and named, whatever it raises."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            register_pass(point.load())
        except Exception as error:  # noqa: BLE001 - it is code of others, and no reason to stop
            package = point.dist.name if point.dist is not None else "an unknown package"
            warnings.warn(
                f"the pass {point.name!r} of {package} is not known: its entry point {point.value} gives "
                f"{type(error).__name__}: {error}",
                FxoptWarning,
                stacklevel=4,
            )
