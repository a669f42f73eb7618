"""A GPU that isn't there: Triton compiles for it, launches do nothing or fail, and tensors stay on the CPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxopt.codegen.attention import operator as forward
from fxopt.codegen.attention import packed
from fxopt.codegen.attention.backward import operator as backward
from fxopt.codegen.attention.weights import operator as weights
from fxopt.codegen.attention.weights import together
from fxopt.codegen.linear_attention import operator as linear
from fxopt.codegen.mlp.narrow_mlp import operator as mlp
from fxopt.codegen.norm.residual_norm import backward_operator as norm_backward
from fxopt.codegen.norm.residual_norm import operator as norm

#: The operators that launch kernels, and what does.
LAUNCHING = (
    (forward.attention_forward, forward.on_cuda),
    (backward.attention_backward, backward._cuda),
    (packed.attention_packed, packed.on_cuda),
    (packed.attention_packed_backward, packed.backward_on_cuda),
    (weights.attention_weights_forward, weights._cuda),
    (together.attention_and_weights_forward, together.on_cuda),
    (linear.linear_attention_forward, linear._cuda),
    (linear.linear_attention_backward, linear._cuda_backward),
    (mlp.mlp_forward, mlp._cuda),
    (norm.residual_norm_forward, norm._cuda),
    (norm_backward.residual_norm_backward, norm_backward._cuda),
)


@dataclass(frozen=True)
class Compiled:
    """One kernel that was compiled, and where."""

    module: str
    name: str
    thread: int
    cached: bool


class Device:
    """What Triton asks a driver for before it compiles.

    Each is a device of its own: a kernel keeps what was compiled for it by the number of the device, so that one that
    another test has compiled would be compiled no more, or be that of another architecture.
    """

    _numbers = itertools.count()

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._number = next(self._numbers)
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextmanager
def compiler(cache: Path, architecture: int = 90, launches: bool = False) -> Iterator[list[Compiled]]:
    """Triton's compiler for a device of the architecture, with its cache; the kernels that were compiled, so far.

    Operators take CPU tensors where they take those of a GPU: to what launches kernels. That does nothing,
    where ``launches``, and fails otherwise.
    """
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    compiled: list[Compiled] = []

    def note(src: Any, cache_hit: bool, **_: object) -> None:
        compiled.append(Compiled(src.fn.__module__, src.name, threading.get_ident(), cache_hit))

    active = driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (architecture // 10, architecture % 10))
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        patch.setattr(knobs.compilation, "listener", note)
        for operator, launching in LAUNCHING:
            patch.setitem(operator._backend_fns, "cpu", launching)
        if launches:
            patch.setattr(CompiledKernel, "run", property(lambda kernel: lambda *arguments: None))
            patch.setattr(CompiledKernel, "launch_metadata", lambda kernel, *arguments: None)
            patch.setattr(CompiledKernel, "_init_handles", lambda kernel: None)
            patch.setattr(torch.cuda, "current_device", lambda: torch.zeros(0).get_device())
        driver.set_active(Device(architecture))
        try:
            yield compiled
        finally:
            driver.set_active(active)
