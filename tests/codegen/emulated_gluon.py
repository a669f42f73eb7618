"""Gluon on the CPU: what generated Hopper kernels call, in PyTorch, every group of warps in a thread of its own.

Barriers count and wait as the hardware's do, so that a wrong phase or count ends in a deadlock, which is reported.
Copies and products happen where they are asked for. Shared memory begins as NaN, or the least integer.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.codegen.emulated_barriers import Barrier, Barriers, NamedBarriers

_PROGRAM = threading.local()
#: Where TMA begins to read, and what it steps by, in bytes.
_ALIGNMENT = 16


class Pointer:
    """Addresses of elements of a tensor, counted from its first one."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    def to(self, dtype: torch.dtype) -> Pointer:
        return self


def pointer(x: Tensor) -> Pointer:
    """The address of ``x``, from where strides lead anywhere in its memory."""
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return Pointer(torch.as_strided(x, (size,), (1,)))


class Shared:
    """A tile in shared memory, or tiles."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.dtype = values, values.dtype

    def index(self, n: Any) -> Shared:
        return Shared(self.values[int(n)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.values.narrow(dim, start, length))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.values.view(*shape))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        return Shared(self.values.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.values.permute(*order))

    def load(self, layout: object) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        assert values.shape == self.values.shape and values.dtype == self.values.dtype
        self.values.copy_(values)


@dataclass
class Descriptor:
    """``TensorDescriptor``: blocks of a tensor, zero beyond its end."""

    base: Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: list[int]
    layout: object

    def __post_init__(self) -> None:
        bits = (stride * self.base.element_size() % _ALIGNMENT for stride in self.strides[:-1])
        assert not any(bits) and self.strides[-1] == 1 and self.base.data_ptr() % _ALIGNMENT == 0

    @staticmethod
    def from_tensor(x: Tensor, block_shape: list[int], layout: object) -> Descriptor:
        return Descriptor(x, x.shape, x.stride(), block_shape, layout)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def block_type(self) -> SimpleNamespace:
        return SimpleNamespace(nbytes=prod(self.block_shape) * self.base.element_size())

    def block(self, place: Sequence[Any]) -> Tensor:
        found = torch.zeros(self.block_shape, dtype=self.dtype)
        inside, outside = self._overlap(place)
        found[inside] = self._whole[outside]
        return found

    def write(self, place: Sequence[Any], values: Tensor) -> None:
        inside, outside = self._overlap(place)
        self._whole[outside] = values.view(self.block_shape)[inside]

    @property
    def _whole(self) -> Tensor:
        return torch.as_strided(self.base, list(self.shape), list(self.strides))

    def _overlap(self, place: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of a block at ``place`` lies in the tensor, as indices into the block and into the tensor."""
        size = self.base.element_size()
        assert int(place[-1]) * size % _ALIGNMENT == 0, "TMA reads from multiples of 16 bytes only"
        assert self.block_shape[-1] * size % _ALIGNMENT == 0 and all(0 < n <= 256 for n in self.block_shape)
        spans = [
            (int(p), min(int(p) + n, size)) for p, n, size in zip(place, self.block_shape, self.shape, strict=True)
        ]
        inside = tuple(slice(0, max(stop - start, 0)) for start, stop in spans)
        return inside, tuple(slice(start, max(stop, start)) for start, stop in spans)


class _Layout:
    def __init__(self, *parts: object, **named: object) -> None: ...

    @staticmethod
    def get_default_for(*parts: object) -> _Layout:
        return _Layout()


class _BarrierLayout(_Layout):
    pass


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Barriers | Barrier | Shared:
    if isinstance(layout, _BarrierLayout):
        return Barriers(shape[0]) if len(shape) > 1 else Barrier()
    poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return Shared(torch.full(list(shape), poison, dtype=dtype))


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _copy(source: Descriptor, place: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    block = source.block(place)
    target.values.copy_(block.view(target.values.shape))
    barrier.change(0, -block.numel() * block.element_size())


def _multiply(a: Any, b: Shared, acc: Tensor, use_acc: Any = True, is_async: bool = False) -> Tensor:
    left = a.values if isinstance(a, Shared) else a
    product = left.float() @ b.values.float()
    assert product.shape == acc.shape
    return acc + product if use_acc else product


def _wait(outstanding: int, deps: Sequence[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


_ADDING = threading.Lock()


def _write(target: Descriptor, place: Sequence[Any], source: Shared) -> None:
    target.write(place, source.values)


def _add(target: Descriptor, place: Sequence[Any], source: Shared) -> None:
    with _ADDING:
        target.write(place, target.block(place) + source.values)


def _builtin(function: Callable[..., None]) -> Callable[..., None]:
    """What a module makes of a compiler's own operation."""
    assert function.__name__ == "add_tile"
    return _add


def _named(text: str, number: Any) -> Any:
    barriers: NamedBarriers = _PROGRAM.named
    act = barriers.wait if text.startswith("bar.sync") else barriers.arrive
    act(int(number), int(re.findall(r", (\d+);", text)[0]))
    return number


def _assembly(text: str, constraints: str, given: Sequence[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if text.startswith("bar."):
        return _named(text, given[0])
    if "tanh.approx" in text or text.startswith("mul.lo.s32"):
        return torch.tanh(given[0]) if "tanh.approx" in text else given[0] * given[1]
    if text == "mov.b32 $0, 0;":
        return torch.zeros_like(torch.as_tensor(given[0])) if given else torch.tensor(0)
    if "ctaid.x" in text:
        return torch.tensor(_PROGRAM.count if "%nctaid.x" in text else _PROGRAM.number)
    if "cvt.rn" in text:
        pairs = torch.stack(list(given), -1)
        return pairs.to(torch.bfloat16 if "bf16" in text else torch.float16)
    if "{$0, $1}" in text:
        return given[0][..., 0], given[0][..., 1]
    if "bmsk" in text:
        return (1 << given[0].clamp(max=32).long()) - 1
    if text == "add.s32 $0, $1, 1;":
        given = [given[0] + 1]
    return given[0] if given else None


def _load(at: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    offset = torch.as_tensor(at.offset)
    if mask is None:
        return at.memory[offset]
    kept = torch.as_tensor(mask)
    offset, kept = torch.broadcast_tensors(offset, kept)
    found = at.memory[torch.where(kept, offset, 0)]
    return torch.where(kept, found, torch.full_like(found, other))


def _store(at: Pointer, values: Tensor, mask: Any) -> None:
    offset, kept, values = torch.broadcast_tensors(torch.as_tensor(at.offset), torch.as_tensor(mask), values)
    assert values.dtype == at.memory.dtype
    at.memory[offset[kept]] = values[kept]


def _specialize(groups: Sequence[tuple[Callable[..., None], Sequence[Any]]], *_: object) -> None:
    program, failures, named = (_PROGRAM.number, _PROGRAM.count), [], NamedBarriers()

    def run(function: Callable[..., None], arguments: Sequence[Any]) -> None:
        _PROGRAM.number, _PROGRAM.count = program
        _PROGRAM.named = named
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - it is raised where the threads are waited for
            failures.append(error)

    threads = [threading.Thread(target=run, args=group, daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert named.idle, "an arrival that nobody waited for"


class Kernel:
    """A function that is launched on a grid, and called by others."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, launch_pdl: bool = False, **named: Any) -> None:
            given = [pointer(x) if isinstance(x, Tensor) else x for x in arguments]
            given = [torch.tensor(x) if isinstance(x, int) else x for x in given]
            for number in range(grid[0]):
                _PROGRAM.number, _PROGRAM.count = number, grid[0]
                self.function(*given, **named)

        return launch


def _jit(function: Callable[..., Any] | None = None, **_: object) -> Any:
    return Kernel(function) if function is not None else Kernel


def _number(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


GLUON = SimpleNamespace(jit=_jit)
LANGUAGE = SimpleNamespace(
    allocate_shared_memory=_allocate,
    abs=torch.abs,
    arange=lambda start, stop, layout: torch.arange(start, stop),
    cast=lambda x, dtype: torch.as_tensor(x).to(dtype),
    cdiv=lambda a, b: -(-torch.as_tensor(a) // b),
    constexpr=int,
    convert_layout=lambda x, layout: x,
    exp2=torch.exp2,
    fma=lambda x, y, z: x * y + z,
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    inline_asm_elementwise=_assembly,
    join=lambda low, high: torch.stack((low, high), -1),
    load=_load,
    log=torch.log,
    max=torch.amax,
    maximum=_number(torch.maximum),
    minimum=_number(torch.minimum),
    num_programs=lambda axis: torch.tensor(_PROGRAM.count),
    program_id=lambda axis: torch.tensor(_PROGRAM.number),
    reshape=torch.reshape,
    split=lambda x: (x[..., 0], x[..., 1]),
    static_range=range,
    store=_store,
    sum=torch.sum,
    thread_barrier=lambda: None,
    to_tensor=torch.as_tensor,
    warp_specialize=_specialize,
    where=lambda kept, x, y: torch.where(torch.as_tensor(kept), x, y),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    zeros_like=torch.zeros_like,
    bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32,
    int8=torch.int8, int16=torch.int16, int32=torch.int32, int64=torch.int64, uint8=torch.uint8,
    BlockedLayout=_Layout, DotOperandLayout=_Layout, NVMMADistributedLayout=_Layout, NVMMASharedLayout=_Layout,
    SliceLayout=_Layout, SwizzledSharedLayout=_Layout,
)  # fmt: skip
BARRIERS = SimpleNamespace(
    MBarrierLayout=_BarrierLayout,
    init=_init,
    expect=lambda barrier, size: barrier.change(1, size),
    arrive=lambda barrier, count: barrier.change(count, 0),
    wait=lambda barrier, parity, pred=True: barrier.wait(int(parity)) if pred else None,
)
TMA = SimpleNamespace(
    async_copy_global_to_shared=_copy, async_copy_shared_to_global=_write, store_wait=lambda outstanding: None
)
_HERE = "from tests.codegen.emulated_gluon import"
_IMPORTS = {
    "from triton.experimental import gluon\n": f"{_HERE} GLUON as gluon\n",
    "from triton.experimental.gluon import language as gl\n": f"{_HERE} LANGUAGE as gl\n",
    "from triton.experimental.gluon.language._core import builtin\n": f"{_HERE} _builtin as builtin\n",
    "from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma\n": (
        f"{_HERE} BARRIERS as mbarrier, TMA as tma, fence as fence_async_shared\n"
    ),
    "from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait\n": (
        f"{_HERE} _multiply as warpgroup_mma, _wait as warpgroup_mma_wait\n"
    ),
    "from triton.experimental.gluon.nvidia.hopper import TensorDescriptor\n": (
        f"{_HERE} Descriptor as TensorDescriptor\n"
    ),
}


def fence() -> None:
    """Threads see each other's writes."""


def emulated(source: str, folder: Path) -> ModuleType:
    """The generated module ``source`` with its Gluon kernels emulated; its Triton kernels are left as they are."""
    for line, instead in _IMPORTS.items():
        source = source.replace(line, instead)
    assert "triton.experimental" not in source
    # In place, PyTorch's tensors keep their shapes.
    source = re.sub(r"kept &= (.*)", r"kept = kept & (\1)", source)
    # Tensors have no layouts here.
    source = source.replace(".type.layout", ".ndim")
    path = folder / f"emulated_{abs(hash(source))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
