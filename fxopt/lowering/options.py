"""The options of the backend and of `fxopt.optimize`, checked once and carried as one value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from fxopt.errors import OptionError
from fxopt.rewriter.passes import Pass

LOWERINGS: Final = ("auto", "triton", "sdpa", "aten")
VERIFICATIONS: Final = ("structural", "numeric")
BASES: Final = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        lower: what rewritten sites run as: ``"auto"`` (measured), or one kind forced wherever it can serve.
        verify: ``"structural"`` (always done), or ``"numeric"`` to check every rewritten site against float64 as well.
        passes: names or instances of the passes to run instead of the exact pipeline; ``None`` for that pipeline.
        base: what runs the rest of the graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        strict: raise where fxopt would otherwise fall back and say so.
        inductor: settings of torch._inductor.config for this model, such as ``{"max_autotune": True}``.
    """

    lower: str = "auto"
    verify: str = "structural"
    passes: tuple[str | Pass, ...] | None = None
    base: str = "inductor"
    strict: bool = False
    inductor: tuple[tuple[str, Any], ...] = ()


_CHOICES: Final = {"lower": LOWERINGS, "verify": VERIFICATIONS, "base": BASES}


_NAMES: Final = tuple(field.name for field in fields(Options))


def read_options(
    given: Mapping[str, Any] | None, names: Sequence[str] = _NAMES, further: Sequence[str] = ()
) -> Options:
    """Check a mapping of options.

    Args:
        given: names and values.
        names: the options that can be given here.
        further: what else the caller takes, and reads itself; the message about an unknown option lists it too.

    Raises:
        OptionError: an unknown option, or a value that it can't take; the message lists what there is.
    """
    if not isinstance(given, Mapping | None):
        raise OptionError(f"options={given!r} is not possible; give a mapping of names to values")
    given = dict(given or {})
    for name in given:
        if name not in names:
            raise OptionError(_unknown(name, (*names, *further)))
    for name, choices in _CHOICES.items():
        if name in given and given[name] not in choices:
            raise OptionError(f"{name}={given[name]!r} is not possible; choose one of {', '.join(choices)}")
    if not isinstance(given.get("strict", False), bool):
        raise OptionError(f"strict={given['strict']!r} is not possible; choose True or False")
    _read_collections(given)
    return Options(**given)


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no option {name!r}{' here' if name in _NAMES else ''}.{hint} The options are: {', '.join(known)}"


def _read_collections(given: dict[str, Any]) -> None:
    passes = given.get("passes")
    if isinstance(passes, str) or not isinstance(passes, Iterable | None):
        raise OptionError(f"passes={passes!r} is not possible; give a list of pass names or instances")
    if passes is not None:
        given["passes"] = tuple(passes)
    if not isinstance(given.get("inductor", {}), Mapping) or not all(map(_is_text, given.get("inductor", {}))):
        raise OptionError("inductor must be a mapping of torch._inductor.config settings, by name")
    if "inductor" in given:
        given["inductor"] = tuple(sorted(given["inductor"].items()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)
