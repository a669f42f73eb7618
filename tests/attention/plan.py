"""Which conditions each case runs under: all that decide, and a rotating sample of the rest of the product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

from fxopt.testing import SIZE_COLLISIONS
from tests.attention.case import Mode
from tests.attention.check import Run, runs
from tests.attention.further_spellings import FURTHER
from tests.attention.near_misses import NEAR_MISSES
from tests.attention.spellings import SPELLINGS
from tests.attention.weight_readers import WEIGHT_NEAR_MISSES, WEIGHT_READERS

Condition = tuple[Mode, str, torch.dtype]

_MODES: Final[tuple[Mode, ...]] = ("inference", "training")
_ALWAYS: Final[tuple[Condition, ...]] = (
    ("inference", "static", torch.float32),
    ("inference", "all-equal", torch.float32),
)
_SPELLINGS_TOO: Final[tuple[Condition, ...]] = (
    ("training", "static", torch.float32),
    ("inference", "dynamic", torch.float32),
)
_HALF: Final = (torch.bfloat16, torch.float16)
_ROTATING: Final[tuple[Condition, ...]] = (
    ("training", "static", torch.float32),
    ("training", "dynamic", torch.float32),
    ("training", "dynamic", torch.bfloat16),
    ("training", "static", torch.float16),
    ("inference", "dynamic", torch.float32),
    *((mode, name, torch.float32) for name in SIZE_COLLISIONS if name != "all-equal" for mode in _MODES),
)


def _rotating(position: int) -> Condition:
    return _ROTATING[position % len(_ROTATING)]


def _spelling_conditions(position: int) -> Iterable[Condition]:
    half: Condition = ("inference", "static", _HALF[position % 2])
    return (*_ALWAYS, *_SPELLINGS_TOO, half, _rotating(position))


def _near_miss_conditions(position: int) -> Iterable[Condition]:
    mode, shapes, dtype = _rotating(position)
    return (*_ALWAYS, (mode, shapes, dtype), ("training", shapes, dtype))


SPELLING_RUNS: Final[list[Run]] = runs((*SPELLINGS, *FURTHER, *WEIGHT_READERS), _spelling_conditions)
NEAR_MISS_RUNS: Final[list[Run]] = runs((*NEAR_MISSES, *WEIGHT_NEAR_MISSES), _near_miss_conditions)


def planned_keys() -> list[tuple[str, ...]]:
    """The keys of all runs, in order."""
    return [run.key for run in (*SPELLING_RUNS, *NEAR_MISS_RUNS)]
