"""Launching kernels that work on rows: as rows at one distance, and from memory where that was done before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.codegen.building import launcher, only_compiles
from fxopt.codegen.replay import Replay, layouts, record, remember

#: Launches to repeat, by what they depend on.
_REPLAYS: Final[dict[tuple[object, ...], Replay]] = {}
_LIBRARY: Final = torch.library.Library("fxopt", "FRAGMENT")
#: What base compilers replace after autograd: operators by the same without PyTorch's layers of Python for autograd.
DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {}


def rows_objection(x: Tensor) -> str | None:
    """Why ``x [..., C]`` can't be read as rows at one distance, as a sentence, or ``None`` when it can."""
    if not statically_known_true(x.stride(-1) == 1) and not statically_known_true(x.shape[-1] == 1):
        return "the elements of a row do not lie side by side"
    return None if _one_distance(x) else "its rows do not lie at one distance"


def _one_distance(x: Tensor) -> bool:
    axes = [axis for axis in range(x.dim() - 1) if not statically_known_true(x.shape[axis] == 1)]
    pairs = pairwise(axes)
    return all(statically_known_true(x.stride(a) == x.stride(b) * x.shape[b]) for a, b in pairs)


def as_rows(x: Tensor) -> Tensor:
    """``x`` itself where it is rows at one distance, else a contiguous copy."""
    return x if x.is_contiguous() or rows_objection(x) is None else x.contiguous()


def key_of(facts: tuple[object, ...], operands: Sequence[Tensor | None]) -> tuple[object, ...]:
    """What a launch depends on: ``facts``, which operands there are, and their layouts."""
    given = [x for x in operands if x is not None]
    return (facts, *(x is None for x in operands), *layouts(given))


def remembered(key: tuple[object, ...], operands: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """The results of the launch under ``key``, repeated on ``operands``; ``None`` where there was none yet."""
    replay = None if only_compiles() else _REPLAYS.get(key)
    # A replay runs on the current device.
    if replay is None or operands[0] is None or operands[0].get_device() != torch.cuda.current_device():
        return None
    return replay([x for x in operands if x is not None])


def launched(
    key: tuple[object, ...],
    kernel: ModuleType,
    operands: Sequence[Tensor | None],
    *options: bool,
    laid: Callable[[Tensor], Tensor] = as_rows,
) -> tuple[Tensor, ...]:
    """What the module's launcher gives, for operands ``laid`` out as it reads them; remembered under ``key``."""
    given = [None if x is None else laid(x) for x in operands]
    launch = partial(_results, launcher(kernel), *given, *options)
    if only_compiles():
        return launch()
    results, replay = record(kernel, launch, [x for x in given if x is not None])
    # What was copied is another tensor the next time.
    if all(x is y for x, y in zip(given, operands, strict=True)):
        remember(_REPLAYS, key, replay)
    return results


def _results(launch: Callable[..., Tensor | tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    found = launch(*arguments)
    return (found,) if isinstance(found, Tensor) else found


def bare(name: str, on_cuda: Callable[..., Any], fake: Callable[..., Any], operator: Any) -> None:
    """Define ``fxopt::<name>_launch``: the custom operator ``fxopt::<name>`` without its layers, 10 µs a call.

    Base compilers put it in the operator's place (`DECOMPOSITIONS`), when autograd is done with the graph.

    Args:
        name: the operator's name.
        on_cuda: what it does on CUDA.
        fake: its fake implementation.
        operator: the custom operator itself, whose function is what it does on the CPU.
    """
    whole = getattr(torch.ops.fxopt, name).default
    _LIBRARY.define(f"{name}_launch{str(whole._schema).partition(name)[2]}", tags=whole.tags)
    _LIBRARY.impl(f"{name}_launch", on_cuda, "CUDA")
    _LIBRARY.impl(f"{name}_launch", operator._init_fn, "CPU")
    torch.library.register_fake(f"fxopt::{name}_launch", fake, lib=_LIBRARY)
    DECOMPOSITIONS[whole] = getattr(torch.ops.fxopt, f"{name}_launch").default
