"""The families of generated attention kernels, and the one that a printed configuration belongs to.

A configuration is a text. Its family stands before a colon (``split:…``); the portable kernel's has none
(``128x64w8s3``). Every family generates a module that runs on its own and defines
``launch(q, k, v, captures, with_lse) -> (out, lse)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch

from fxopt.codegen.attention.hopper import kernel as hopper
from fxopt.codegen.attention.pairs import kernel as pairs
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
        objection: why it can't serve a problem, as a sentence, or ``None`` when it can; what the machine lacks last
            (`fxopt.codegen.attention.machine`).
        candidates: the configurations worth measuring for a problem that it can serve, best guess first.
        seconds: how long a configuration should take on a problem (`fxopt.codegen.attention.cost`).
        source: the source of the module for a specification, head dimensions ``D`` and ``E``, dtype and configuration.
        pads_values: whether values narrower than keys must be padded to the width of keys before the launch.
        averages: whether it can give the mean of the values where a row keeps no key.
        drops: whether it can drop weights; its launch takes a ``seed`` then.
    """

    objection: Callable[[Problem], str | None]
    candidates: Callable[[Problem], tuple[str, ...]]
    seconds: Callable[[Problem, str], float]
    source: Callable[[AttentionSpec, int, int, torch.dtype, str], str]
    pads_values: bool = False
    averages: bool = False
    drops: bool = False


@dataclass(frozen=True)
class Ranking:
    """What the cost model makes of a problem.

    Attributes:
        tried: the configurations to build and to measure, best guess first.
        expected: the seconds that each of them should take.
        left_out: the same of those that are not to be tried.
        refused: why families can't serve, by prefix.
    """

    tried: tuple[str, ...]
    expected: Mapping[str, float]
    left_out: Mapping[str, float]
    refused: Mapping[str, str]


def _portable_source(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: str) -> str:
    return portable.source(spec, head_dim, value_dim, dtype, portable.read_config(config))


#: Configurations tried for a problem, and of one family, at most.
_TRIED, _OF_A_FAMILY = 4, 2
#: How much longer than the best one a configuration may be expected to take and still be tried: what the cost model
#: is trusted to tell apart.
_WORTH: Final = 1.4
#: Seconds from the launch of any kernel to its first results, which make small problems hard to tell apart.
_LAUNCH: Final = 3e-6

#: By the prefix of their configurations, the most general one last.
FAMILIES: Final[dict[str, Family]] = {
    "hopper": Family(hopper.objection, hopper.candidates, hopper.seconds, hopper.source, averages=True),
    "pairs": Family(pairs.objection, pairs.candidates, pairs.seconds, pairs.source, averages=True),
    "short": Family(short.objection, short.candidates, short.seconds, short.source, pads_values=True, averages=True),
    "split": Family(split.objection, split.candidates, split.seconds, split.source),
    "": Family(
        portable.objection_to,
        portable.candidates_for,
        portable.seconds,
        _portable_source,
        pads_values=True,
        averages=True,
        drops=True,
    ),
}


@lru_cache(maxsize=1024)
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


@lru_cache(maxsize=256)
def ranking(problem: Problem) -> Ranking:
    """The configurations worth building and measuring, of every family that can serve, best guess first.

    They are at most four, at most two of each family, and none that should take much longer than the best; but one of
    the most general family that can serve is always among them, should the others fail.
    """
    refused: dict[str, str] = {}
    expected: dict[str, dict[str, float]] = {}
    for prefix, kind in FAMILIES.items():
        reason = _ability_objection(kind, problem.spec) or kind.objection(problem)
        if reason is not None:
            refused[prefix] = reason
        else:
            expected[prefix] = {c: _LAUNCH + kind.seconds(problem, c) for c in kind.candidates(problem)}
    times = {config: time for found in expected.values() for config, time in found.items()}
    tried = _worth_trying([found for found in expected.values() if found])
    left_out = {config: time for config, time in times.items() if config not in tried}
    return Ranking(tried, {config: times[config] for config in tried}, left_out, refused)


def _worth_trying(families: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """The configurations to try of ``families``, the most general one last, given what each should take."""
    if not families:
        return ()
    times = {config: time for found in families for config, time in found.items()}
    best = [sorted(found, key=lambda config: times[config])[:_OF_A_FAMILY] for found in families]
    ordered = sorted((config for found in best for config in found), key=lambda config: times[config])
    worth = [config for config in ordered if times[config] <= _WORTH * times[ordered[0]]][:_TRIED]
    general = best[-1][0]
    return tuple(worth) if general in worth else (*worth[: _TRIED - 1], general)


def candidates(problem: Problem) -> tuple[tuple[str, ...], dict[str, str]]:
    """The configurations worth measuring, best guess first; and why some families can't serve, by prefix."""
    found = ranking(problem)
    return found.tried, dict(found.refused)


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
