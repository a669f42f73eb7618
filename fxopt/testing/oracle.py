"""The float64 oracle: what a program would compute if rounding did not exist.

Tests compare both the eager program and its rewritten form with the same program evaluated in float64. The programs of
interest cast on purpose (``.float()``, ``softmax(dtype=torch.float32)``, ``.to(q.dtype)``); inside `DoublePrecision`
every such cast goes to float64 instead, so the only thing left of the original precision is the values of its inputs
and of literal constants (``torch.finfo(torch.float16).min`` stays −65504).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.testing.evaluation import Evaluation, detached, evaluate

_COMPLEX: Final = (torch.complex32, torch.complex64)
_BIT_VIEWS: Final = (torch.ops.aten.view.dtype,)
_FUSED_UPCASTS: Final = (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that stands for ``dtype`` in the oracle: float64, complex128, or itself for anything not floating."""
    if dtype in _COMPLEX:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


class DoublePrecision(TorchDispatchMode):
    """While active, every floating tensor that an operator reads or makes is float64 (complex128).

    Requested dtypes are widened as well. A reduced-precision tensor that the program reaches without receiving it as
    an argument (a closure, a plain module attribute) is read, and mutated, through one float64 twin. Reinterpreting
    the bits of a float (``view(dtype)``) has no meaning here and is left as it is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._twins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _BIT_VIEWS:
            return func(*args, **(kwargs or {}))
        wide_args, wide_kwargs = tree_map(self._widen, (args, kwargs or {}))
        if func in _FUSED_UPCASTS:  # the flag asks for a half input, which no longer exists
            wide_args = (*wide_args[:2], False)
        return func(*wide_args, **wide_kwargs)

    def _widen(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return widened(value)
        if not isinstance(value, Tensor) or value.dtype == widened(value.dtype):
            return value
        if value not in self._twins:
            self._twins[value] = value.to(widened(value.dtype))
        return self._twins[value]


@contextmanager
def double_precision() -> Iterator[None]:
    """`DoublePrecision`, with float64 as the default dtype and ``torch.compile`` inside the program switched off."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.compiler.set_stance("force_eager"), DoublePrecision():
            yield
    finally:
        torch.set_default_dtype(default)


def upcast(values: Any) -> Any:
    """Copy a nest of arguments with its floating tensors in float64.

    Values, ``requires_grad`` and the identity of a tensor that occurs twice are kept; integer and boolean tensors are
    cloned, so that a program that mutates its arguments does not touch the caller's.
    """
    copies: dict[int, Tensor] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in copies:
            wide = value.detach().clone().to(widened(value.dtype))
            copies[id(value)] = wide.requires_grad_(value.requires_grad)
        return copies[id(value)]

    return tree_map(one, values)


def _upcast_program(program: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(program, nn.Module):
        return program
    return copy.deepcopy(program).to(torch.float64)


def oracle(program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Evaluate ``program`` (a function or an ``nn.Module``) in float64.

    Args:
        program: what to evaluate; a module is deep-copied and its parameters and buffers are upcast.
        args: its arguments, nested as it likes; every floating tensor in them is upcast to float64.
        kwargs: its keyword arguments, upcast likewise.

    Returns:
        What the program returns, detached, every floating tensor in float64.

    Random draws depend on the global generators; seed them before the call. Draws made directly in a reduced dtype
    (``torch.randn(dtype=torch.bfloat16)``) are other numbers in float64.
    """
    wide_args, wide_kwargs = upcast((args, kwargs))
    wide_program = _upcast_program(program)
    with double_precision():
        outputs = wide_program(*wide_args, **wide_kwargs)
    return upcast(detached(outputs))


def oracle_gradients(program: Callable[..., Any], *args: Any, **kwargs: Any) -> Evaluation:
    """Evaluate ``program`` and its gradients in float64: `fxopt.testing.evaluate` as `oracle` would run it."""
    wide_args, wide_kwargs = upcast((args, kwargs))
    wide_program = _upcast_program(program)
    with double_precision():
        result = evaluate(wide_program, *wide_args, **wide_kwargs)
    return Evaluation(upcast(result.outputs), upcast(result.gradients))
