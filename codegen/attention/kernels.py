"""The families of generated attention kernels, and the one that a printed configuration belongs to.

A configuration is a text. Its family stands before a colon (``split:…``); the portable kernel's has none
(``128x64w8s3``). Every family generates a module that runs on its own and defines
``launch(q, k, v, captures, with_lse) -> (out, lse)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.attention.hopper import kernel as hopper
from fxopt.codegen.attention.portable import kernel as portable
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short import kernel as short
from fxopt.codegen.attention.split import kernel as split
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of kernel.

    Attributes:
        objection: why it can't serve a problem, as a sentence, or ``None`` when it can.
        candidates: the configurations worth measuring for a problem that it can serve, best guess first.
        source: the source of the module for a specification, head dimensions ``D`` and ``E``, dtype and configuration.
        pads_values: whether values narrower than keys must be padded to the width of keys before the launch.
        averages: whether it can give the mean of the values where a row keeps no key.
        drops: whether it can drop weights; its launch takes a ``seed`` then.
    """

    objection: Callable[[Problem], str | None]
    candidates: Callable[[Problem], tuple[str, ...]]
    source: Callable[[AttentionSpec, int, int, torch.dtype, str], str]
    pads_values: bool = False
    averages: bool = False
    drops: bool = False


def _portable_source(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> str:
    return portable.source(spec, head_dim, value_dim, dtype, portable.read_config(config))


#: By the prefix of their configurations, the most general one last.
FAMILIES: Final[dict[str, Family]] = {
    "hopper": Family(hopper.objection, hopper.candidates, hopper.source),
    "short": Family(short.objection, short.candidates, short.source, pads_values=True, averages=True),
    "split": Family(split.objection, split.candidates, split.source),
    "": Family(
        portable.objection_to, portable.candidates_for, _portable_source, pads_values=True, averages=True, drops=True
    ),
}


def family(config: str) -> Family:
    """The family that a printed configuration belongs to.

    Raises:
        LoweringError: there is no such family.
    """
    prefix = config.partition(":")[0] if ":" in config else ""
    if prefix not in FAMILIES:
        known = ", ".join(repr(name) for name in FAMILIES)
        raise LoweringError(f"no family of attention kernels is called {prefix!r} ({config!r}); there are {known}")
    return FAMILIES[prefix]


def candidates(problem: Problem) -> tuple[tuple[str, ...], dict[str, str]]:
    """The configurations worth measuring, of every family that can serve; and why the others can't, by prefix."""
    found: list[str] = []
    refused: dict[str, str] = {}
    for prefix, kind in FAMILIES.items():
        reason = kind.objection(problem) or _ability_objection(kind, problem.spec)
        if reason is None:
            found.extend(kind.candidates(problem))
        else:
            refused[prefix] = reason
    return tuple(found), refused


def source(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> str:
    """The source of the module of one configuration; the same arguments always give the same text.

    Raises:
        LoweringError: the kernel can't be generated.
    """
    kind = family(config)
    reason = _ability_objection(kind, spec)
    if reason is not None:
        raise LoweringError(f"{config} can't serve this attention: {reason} ({spec})")
    return kind.source(spec, head_dim, value_dim, dtype, config)


def _ability_objection(kind: Family, spec: AttentionSpec) -> str | None:
    if spec.empty_rows == "uniform" and not kind.averages:
        return "rows without keys give the mean of the values, which it does not compute"
    return "it drops no weights" if spec.dropout and not kind.drops else None
