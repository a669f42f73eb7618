"""Launches remembered: what a launcher works out in Python, done once for operands of one layout.

A launcher reads sizes and strides, and Triton specialises some forty arguments: 60 µs of Python and more, as long as a
small kernel runs. All of it follows from the layouts of the operands. So the first launch is recorded and those that
follow are replayed: results and scratch are allocated, and the compiled kernels are called with the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: How the names of a generated module's kernels end; the functions that they call are named otherwise.
_KERNEL: Final = "_kernel"
#: Triton compiles other code for addresses that this divides.
_ALIGNMENT: Final = 16
_LOCK: Final = threading.RLock()
#: Layouts that a dictionary of replays holds.
_MOST: Final = 4096
Results = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Allocation:
    """A tensor that a launch makes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class _Launch:
    """A call of a compiled kernel: its arguments, and where among them stand which tensors, and descriptors of them."""

    run: Callable[..., object]
    arguments: list[Any]
    tensors: tuple[tuple[int, int], ...]
    descriptors: tuple[tuple[int, int], ...]

    def __call__(self, pool: Sequence[Tensor]) -> None:
        arguments = self.arguments.copy()
        for place, n in self.tensors:
            arguments[place] = pool[n]
        for place, n in self.descriptors:
            arguments[place] = _described(arguments[place], pool[n])
        self.run(*arguments)


@dataclass(frozen=True, slots=True)
class Replay:
    """The launches of one call of a launcher, for other operands of the same layouts."""

    results: int
    made: tuple[_Allocation, ...]
    launches: tuple[_Launch, ...]

    def __call__(self, operands: Sequence[Tensor]) -> Results:
        """Launch on ``operands`` and return the results."""
        made = [make() for make in self.made]
        pool = (*operands, *made)
        for launch in self.launches:
            launch(pool)
        return tuple(made[: self.results])


def layouts(operands: Sequence[Tensor]) -> tuple[object, ...]:
    """What the launches for ``operands`` depend on: sizes, strides, dtypes, devices, alignment, and which are the same.

    A launch that was given one tensor twice doesn't tell which of the two it is that a kernel reads.
    """
    parts: list[object] = []
    for x in operands:
        parts += (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % _ALIGNMENT)
    if len(set(map(id, operands))) < len(operands):
        parts.append(tuple(_index(x, operands) for x in operands))
    return tuple(parts)


def precision(dtype: torch.dtype) -> str:
    """What launchers read besides their operands: how products of float32 are computed."""
    return str(torch.backends.cuda.matmul.fp32_precision) if dtype == torch.float32 else ""


def remember(replays: dict[tuple[object, ...], Replay], key: tuple[object, ...], replay: Replay | None) -> None:
    """Keep a replay, if there is one, among ``replays``."""
    if replay is None:
        return
    # Lengths that grow by one would add entries for ever.
    if len(replays) >= _MOST:
        replays.clear()
    replays[key] = replay


def record(
    module: ModuleType, launch: Callable[[], Results], operands: Sequence[Tensor]
) -> tuple[Results, Replay | None]:
    """Run ``launch``, which calls the launcher of ``module`` on ``operands``; its results, and how to repeat it.

    ``None`` where it launched nothing, or computed a tensor in another way than by a kernel of ``module`` that was
    given memory by ``torch.empty``.
    """
    calls: list[_Call] = []
    with _LOCK, _listening(module, calls), _Allocations() as allocations:
        results = launch()
    if not calls or allocations.others:
        return results, None
    return results, _replay(calls, operands, results, allocations.empty)


class _Allocations(TorchFunctionMode):
    """The tensors that ``torch.empty`` makes while it is on, and whether others are made; views don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.empty: list[Tensor] = []
        self.others = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.empty:
            self.empty.append(made)
        elif isinstance(made, Tensor) and function is not Tensor.transpose:
            self.others = True
        return made


@dataclass(frozen=True, slots=True)
class _Call:
    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


@contextmanager
def _listening(module: ModuleType, calls: list[_Call]) -> Iterator[None]:
    """Every kernel of ``module`` that this thread launches inside the block is noted in ``calls``."""
    kernels = [kernel for name, kernel in vars(module).items() if name.endswith(_KERNEL)]
    with ExitStack() as stack:
        for kernel in kernels:
            # Triton looks the method up on the instance at every launch.
            kernel.run = _noting(kernel, kernel.run, calls)
            stack.callback(vars(kernel).pop, "run")
        yield


def _noting(kernel: Any, run: Callable[..., Any], calls: list[_Call]) -> Callable[..., Any]:
    listener = threading.get_ident()

    def noted(*args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        # What Triton computes with tensors is not the launcher's doing.
        with torch._C.DisableTorchFunction():
            compiled = run(*args, grid=grid, warmup=warmup, **kwargs)
        if threading.get_ident() == listener:
            given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            calls.append(_Call(compiled, (*grid, 1, 1)[:3], [given[name] for name in kernel.arg_names]))
        return compiled

    return noted


def _replay(calls: list[_Call], operands: Sequence[Tensor], results: Results, empty: list[Tensor]) -> Replay | None:
    given = [x for call in calls for x in call.arguments]
    scratch = [x for x in empty if any(x is y for y in given) and all(x is not y for y in results)]
    pool = [*operands, *results, *scratch]
    launches = [_launch(call, pool) for call in calls]
    found = tuple(launch for launch in launches if launch is not None)
    if len(found) < len(launches):
        return None
    made = tuple(_Allocation(tuple(x.shape), x.stride(), x.dtype, x.device) for x in pool[len(operands) :])
    return Replay(len(results), made, found)


def _launch(call: _Call, pool: Sequence[Tensor]) -> _Launch | None:
    """The call with the places of its tensors in ``pool``; ``None`` where one is not there."""
    arguments = list(call.arguments)
    tensors = {place: x for place, x in enumerate(arguments) if isinstance(x, Tensor)}
    descriptors = {place: x.base for place, x in enumerate(arguments) if isinstance(getattr(x, "base", None), Tensor)}
    at = {place: _index(x, pool) for place, x in (tensors | descriptors).items()}
    if None in at.values():
        return None
    for place in tensors:
        arguments[place] = None
    for place in descriptors:
        arguments[place] = _described(arguments[place], None)
    return _Launch(
        _runner(call.compiled, call.grid),
        arguments,
        tuple((place, n) for place, n in at.items() if n is not None and place in tensors),
        tuple((place, n) for place, n in at.items() if n is not None and place in descriptors),
    )


def _described(like: Any, base: Tensor | None) -> Any:
    """A descriptor of ``base`` like another one, whose checks it has passed: ``copy.copy`` takes ten times as long."""
    found = object.__new__(type(like))
    found.__dict__.update(like.__dict__, base=base)
    return found


def _runner(compiled: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """What launches ``compiled`` on ``grid``, with what profilers hook into launches only where there are any."""
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    usual: Callable[..., object] = compiled[grid]
    if not isinstance(compiled, CompiledKernel):
        return usual
    start, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def run(*arguments: Any) -> object:
        hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
        # Chains of functions; a function or nothing in earlier versions.
        if any(getattr(hook, "calls", hook) for hook in hooks):
            return usual(*arguments)
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        return start(*grid, stream, function, packed, None, None, None, *arguments)

    return run


def _index(tensor: Tensor, pool: Sequence[Tensor]) -> int | None:
    return next((n for n, known in enumerate(pool) if known is tensor), None)
