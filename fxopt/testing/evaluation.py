"""Run a program once and collect what can be compared: its outputs, and its gradients for a fixed cotangent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

_COMPILED_PREFIX: Final = "_orig_mod."
_Result = TypeVar("_Result")
_GRID: Final = 32  # cotangents are multiples of 1/32 in [-1, 1], exact in every floating dtype


@dataclass(frozen=True)
class Evaluation:
    """What one run gave.

    Attributes:
        outputs: the program's return value, its tensors detached.
        gradients: for each input and parameter that requires one, by name (``args[0]``, ``kwargs['x']``,
            ``parameters.weight``), the gradient of ``Σ outputs·cotangents``. One that no output depends on is absent.
    """

    outputs: Any
    gradients: dict[str, Tensor] = field(default_factory=dict)


def evaluate(program: Callable[..., Any], *args: Any, **kwargs: Any) -> Evaluation:
    """Run ``program`` on copies of its arguments and differentiate it.

    The copies have the strides of the originals, so a program that mutates its arguments can be run again. Gradients
    are taken for every argument tensor with ``requires_grad`` and, for a module, for every parameter with it. The
    cotangents depend only on an output's position and shape, and are exact in every floating dtype, so that runs in
    different dtypes are comparable. No ``.grad`` field is touched.
    """
    fresh_args, fresh_kwargs = _fresh((args, kwargs))
    sources = _differentiable(program, fresh_args, fresh_kwargs)
    outputs = program(*fresh_args, **fresh_kwargs)
    results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not sources or not results:
        return Evaluation(detached(outputs))
    cotangents = [_cotangent(result, position) for position, result in enumerate(results)]
    gradients = torch.autograd.grad(results, list(sources.values()), cotangents, allow_unused=True)
    return Evaluation(
        detached(outputs), {name: grad for name, grad in zip(sources, gradients, strict=True) if grad is not None}
    )


def together(runs: Sequence[_Result]) -> _Result:
    """Several runs of one program, on inputs of the same sizes, as one: tensors of their nests are stacked.

    For `assert_within_budget` where results are small: the largest error of a few numbers is a matter of luck, the
    eager program's too, which the budget derives from. That of several draws isn't.

    Args:
        runs: what `evaluate`, `oracle_gradients` or the program itself gave, one for each draw.

    Returns:
        The same nest with ``[len(runs), ...]`` for each tensor, and the first run's values for all else.
    """
    if isinstance(runs[0], Evaluation):
        outputs, gradients = (together([getattr(run, side) for run in runs]) for side in ("outputs", "gradients"))
        return replace(runs[0], outputs=outputs, gradients=gradients)
    return tree_map(_stacked, *runs)  # type: ignore[no-any-return]


def _stacked(*leaves: Any) -> Any:
    return torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0]


def detached(values: Any) -> Any:
    """The same nest with its tensors cut off from autograd."""
    return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, values)


def _differentiable(program: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Tensor]:
    sources: dict[str, Tensor] = {}
    for root, values in (("args", args), ("kwargs", kwargs)):
        for path, leaf in tree_flatten_with_path(values)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                sources[root + keystr(path)] = leaf
    if isinstance(program, nn.Module):
        for name, parameter in program.named_parameters():
            if parameter.requires_grad:
                sources[f"parameters.{name.replace(_COMPILED_PREFIX, '')}"] = parameter
    return sources


def _fresh(values: Any) -> Any:
    copies: dict[int, Tensor] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copies:
            copies[id(value)] = _same_strides(value).requires_grad_(value.requires_grad)
        return copies[id(value)]

    return tree_map(one, values)


def _same_strides(value: Tensor) -> Tensor:
    storage = value.detach().untyped_storage().clone()
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(storage, value.storage_offset(), value.size(), value.stride())


def _cotangent(output: Tensor, position: int) -> Tensor:
    generator = torch.Generator().manual_seed(position + 1)
    grid = torch.randint(-_GRID, _GRID + 1, output.shape, generator=generator)
    return grid.to(device=output.device, dtype=output.dtype) / _GRID
