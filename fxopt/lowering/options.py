"""The options of the backend and of `fxopt.optimize`, checked once and carried as one value."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
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


def read_options(given: Mapping[str, Any] | None) -> Options:
    """Check a mapping of options.

    Raises:
        OptionError: an unknown option, or a value that it can't take; the message lists what there is.
    """
    given = dict(given or {})
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise OptionError(f"there is no option {name!r}.{hint} The options are: {', '.join(known)}")
    for name, choices in _CHOICES.items():
        if name in given and given[name] not in choices:
            raise OptionError(f"{name}={given[name]!r} is not possible; choose one of {', '.join(choices)}")
    if not isinstance(given.get("strict", False), bool):
        raise OptionError(f"strict={given['strict']!r} is not possible; choose True or False")
    _read_collections(given)
    return Options(**given)


def _read_collections(given: dict[str, Any]) -> None:
    passes = given.get("passes")
    if isinstance(passes, str):
        raise OptionError(f"passes={passes!r} is not possible; give a list of pass names or instances")
    if passes is not None:
        given["passes"] = tuple(passes)
    if not isinstance(given.get("inductor", {}), Mapping):
        raise OptionError("inductor must be a mapping of torch._inductor.config settings")
    if "inductor" in given:
        given["inductor"] = tuple(sorted(given["inductor"].items()))
