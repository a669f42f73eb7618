"""Launches remembered: the same kernels on the same numbers, for other operands; and what can't be remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.replay import Replay, layouts, record

Launcher = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Described:
    """As a descriptor for TMA: a tensor and how blocks of it are read."""

    base: Any
    block: int


@dataclass
class Kernel:
    """As a kernel of Triton: what it was launched with is noted; its first argument becomes the sum of the others."""

    arg_names: tuple[str, ...]
    launches: list[tuple[tuple[int, ...], list[Any]]] = field(default_factory=list)
    compilations: int = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=False, **kwargs)

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        assert not warmup
        self.compilations += 1
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        compiled = Compiled(self)
        compiled[grid](*(given[name] for name in self.arg_names))
        return compiled


@dataclass
class Compiled:
    """A compiled kernel, which takes all arguments by place."""

    kernel: Kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(target: Tensor, *rest: Any) -> None:
            self.kernel.launches.append((grid, [target, *rest]))
            sources = (getattr(x, "base", x) for x in rest)
            target.zero_()
            for source in sources:
                target.add_(source)

        return run


def module_of(*kernels: Kernel) -> ModuleType:
    module = ModuleType("generated")
    for n, kernel in enumerate(kernels):
        setattr(module, f"number_{n}_kernel", kernel)
    return module


def replayed(module: ModuleType, launch: Launcher) -> Replay:
    operands = (torch.ones(2, 3), torch.ones(3))
    results, replay = record(module, lambda: launch(*operands), operands)
    assert replay is not None
    again = replay(operands)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(results, again, strict=True))
    assert [x.stride() for x in results] == [x.stride() for x in again]
    return replay


def test_other_operands_go_through_the_same_kernels() -> None:
    kernel = Kernel(("out_ptr", "a_ptr", "b_ptr", "rows", "BLOCK"))

    def launch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty((3, 2)).transpose(0, 1)
        kernel[(7,)](out, a, b, a.shape[0], BLOCK=16, num_warps=4)
        return out, torch.empty(0)

    replay = replayed(module_of(kernel), launch)
    a, b = torch.randn(2, 3), torch.randn(3)
    out, _ = replay((a, b))
    assert torch.equal(out, a + b + 2 + 16)
    grid, arguments = kernel.launches[-1]
    assert grid == (7, 1, 1)
    assert arguments[0] is out and arguments[1] is a and arguments[2] is b
    assert arguments[3:] == [2, 16]
    assert kernel.compilations == 1
    assert "run" not in vars(kernel), "what listens is taken away again"


def test_scratch_is_made_anew_and_shared_by_the_kernels() -> None:
    first, second = Kernel(("scratch_ptr", "a_ptr")), Kernel(("out_ptr", "scratch_ptr", "b_ptr"))

    def launch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out, unused, scratch = torch.empty(2, 3), torch.empty(0), torch.empty(2, 3)
        first[(1,)](scratch, a)
        second[(2, 3)](out, scratch, b)
        return out, unused

    replay = replayed(module_of(first, second), launch)
    a, b = torch.randn(2, 3), torch.randn(3)
    assert torch.equal(replay((a, b))[0], a + b)
    scratch = [launches[-1][1][place] for launches, place in ((first.launches, 0), (second.launches, 1))]
    assert scratch[0] is scratch[1]
    assert second.launches[-1][0] == (2, 3, 1)


def test_descriptors_describe_the_new_operands() -> None:
    kernel = Kernel(("out_ptr", "a_source", "b_ptr"))

    def launch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(2, 3)
        kernel[(1,)](out, Described(a, 64), b)
        return out, torch.empty(0)

    replay = replayed(module_of(kernel), launch)
    a, b = torch.randn(2, 3), torch.randn(3)
    assert torch.equal(replay((a, b))[0], a + b)
    described = kernel.launches[-1][1][1]
    assert described.base is a and described.block == 64
    replay((torch.zeros(2, 3), b))
    assert described.base is a, "launches that are under way keep their descriptors"


def zeros(a: Tensor) -> Tensor:
    return torch.zeros(a.shape)


KEPT = torch.ones(2, 3)


@pytest.mark.parametrize(
    "other",
    [zeros, Tensor.clone, Tensor.contiguous, lambda a: torch.empty(a.shape).zero_(), lambda _: KEPT],
    ids=["zeros", "clone", "contiguous", "zeroed", "kept"],
)
@pytest.mark.parametrize("described", [False, True])
def test_launches_with_other_tensors_are_not_remembered(other: Callable[[Tensor], Tensor], described: bool) -> None:
    kernel = Kernel(("out_ptr", "a_ptr"))
    operands = (torch.ones(2, 6)[:, ::2], torch.ones(3))

    def launch() -> tuple[Tensor, Tensor]:
        out, given = torch.empty(2, 3), other(operands[0])
        kernel[(1,)](out, Described(given, 8) if described else given)
        return out, torch.empty(0)

    results, replay = record(module_of(kernel), launch, operands)
    assert replay is None
    assert torch.equal(results[0], other(operands[0]))


def test_nothing_launched_is_not_remembered() -> None:
    operands = (torch.ones(0, 3),)
    results, replay = record(module_of(Kernel(("out_ptr",))), lambda: (torch.empty(0, 3), torch.empty(0)), operands)
    assert replay is None and results[0].shape == (0, 3)


def test_a_failed_launch_leaves_kernels_as_they_were() -> None:
    kernel = Kernel(("out_ptr", "missing"))
    with pytest.raises(KeyError, match="missing"):
        record(module_of(kernel), lambda: kernel[(1,)](torch.empty(1)), ())
    assert "run" not in vars(kernel)


def test_layouts_tell_apart_what_kernels_depend_on() -> None:
    x = torch.zeros(64, dtype=torch.bfloat16)
    same = torch.zeros(64, dtype=torch.bfloat16)
    others = [x[:63], x[1:], x[::2], x.half(), x[None]]
    assert layouts([x]) == layouts([same])
    assert all(layouts([x]) != layouts([other]) for other in others)
    assert layouts([x[1:]]) != layouts([torch.zeros(63, dtype=torch.bfloat16)]), "an address that 16 does not divide"


def test_a_tensor_given_twice_is_another_layout() -> None:
    """What was launched on it doesn't tell which of both a kernel reads."""
    x, y = torch.zeros(64), torch.zeros(64)
    assert layouts([x, x]) == layouts([y, y]) != layouts([x, y])
    assert layouts([x, x, y]) != layouts([x, y, x])


def test_one_tensor_twice_is_another_layout_than_two() -> None:
    kernel = Kernel(("out_ptr", "a_ptr", "b_ptr"))

    def launch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(2, 3)
        kernel[(1,)](out, a, b)
        return out, torch.empty(0)

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    _, replay = record(module_of(kernel), lambda: launch(a, a), (a, a))
    assert replay is not None and torch.equal(replay((b, b))[0], 2 * b)
    assert layouts((a, a)) == layouts((b, b)) != layouts((a, b)), "what is repeated would add a to itself"
