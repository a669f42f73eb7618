"""What a generated stream of blocks does, step by step in plain PyTorch: Gluon has no interpreter.

Every group of warps is a thread. Barriers count arrivals and bytes as the hardware's do; products are computed when
they are waited for, which is as late as they may read shared memory, and that holds NaN until something is loaded.
Layouts mean nothing here. Helpers in assembly are replaced by what they stand for.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

#: Seconds after which a barrier that nobody arrives at is given up.
PATIENCE = 3.0


class Barrier:
    """``count`` arrivals, and as many bytes as were announced, end a phase."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phases = self.count = self.missing = self.bytes = 0

    def change(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            if self.missing == 0 and self.bytes == 0:
                self.phases, self.missing = self.phases + 1, self.count
                self.changed.notify_all()

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def wait(self, phase: int, pred: bool = True) -> None:
        with self.changed:
            done = not pred or self.changed.wait_for(lambda: self.phases % 2 != phase, PATIENCE)
        assert done, "a barrier was waited for in vain"


class Shared:
    """Shared memory, or a part of it."""

    layout = None

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, n: Any) -> Shared:
        assert 0 <= int(n) < self.data.shape[0]
        return Shared(self.data[int(n)])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def store(self, x: Tensor) -> None:
        self.data.copy_(x)

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        """As many elements as the shape has, from the first of this part on."""
        assert dtype is self.dtype
        strides = torch.empty(tuple(shape), device="meta").stride()
        return Shared(self.data.as_strided(tuple(shape), strides, self.data.storage_offset()))


class Descriptor:
    """A tensor as blocks of rows and columns; what lies beyond it reads as zero and is not written."""

    layout = None

    def __init__(self, tensor: Tensor, rows: int, width: int) -> None:
        self.tensor, self.dtype, self.block_shape = tensor, tensor.dtype, [1, 1, rows, width]
        self.block_type = SimpleNamespace(nbytes=rows * width * tensor.element_size())

    def part(self, place: Sequence[Any]) -> Tensor:
        b, h, i, j = map(int, place)
        return self.tensor[b, h, i : i + self.block_shape[2], j : j + self.block_shape[3]]


class Pointer:
    """An address of an element of a tensor, or a tensor of such addresses."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + steps)

    @property
    def storage(self) -> Tensor:
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - self.tensor.storage_offset()
        return self.tensor.as_strided((size,), (1,), self.tensor.storage_offset())

    def load(self, mask: Any = True, other: Any = 0) -> Tensor:
        at, keep = torch.broadcast_tensors(torch.as_tensor(self.offset).long(), torch.as_tensor(mask))
        found = self.storage[torch.where(keep, at, 0)]
        return torch.where(keep, found, torch.as_tensor(other, dtype=found.dtype))


class Product:
    """A product that nobody has waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands, self.acc, self.use_acc = (a, b), acc, use_acc

    def value(self) -> Tensor:
        left, right = (x.data if isinstance(x, Shared) else x for x in self.operands)
        product = left.float() @ right.float()
        if not self.use_acc:
            return product
        return product + (self.acc.value() if isinstance(self.acc, Product) else self.acc)


def _scalars(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of tensors, ``plain`` where there is none among the arguments."""

    def either(*arguments: Any) -> Any:
        if not any(isinstance(a, Tensor) for a in arguments):
            return plain(*arguments)
        return function(*(torch.as_tensor(a) for a in arguments))

    return either


def _load_shared(source: Descriptor, place: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    rows = source.part(place)
    block = target.data.view(*source.block_shape[2:])
    block.zero_()
    block[: rows.shape[0], : rows.shape[1]] = rows
    barrier.change(0, -source.block_type.nbytes)


def _store_shared(target: Descriptor, place: Sequence[Any], source: Shared) -> None:
    rows = target.part(place)
    rows.copy_(source.data.view(*target.block_shape[2:])[: rows.shape[0], : rows.shape[1]])


def _wait(pending: int, deps: Sequence[Any]) -> Any:
    found = [x.value() if isinstance(x, Product) else x for x in deps]
    return found[0] if len(found) == 1 else tuple(found)


def _store(address: Pointer, value: Tensor, mask: Tensor) -> None:
    at = torch.as_tensor(address.offset).long()
    address.storage[at[mask]] = value[mask]


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if dtype is torch.int64:
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda n: barriers[int(n)])
    return Shared(torch.full(tuple(shape), torch.nan, dtype=dtype))


def _together(parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001 - a thread's failure belongs to the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads)


def _language(program: int, programs: int) -> SimpleNamespace:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    return SimpleNamespace(
        program_id=lambda axis: program,
        num_programs=lambda axis: programs,
        constexpr=int, float32=torch.float32, int32=torch.int32, int64=torch.int64,
        bfloat16=torch.bfloat16, float16=torch.float16,
        SliceLayout=nothing, BlockedLayout=nothing, SwizzledSharedLayout=nothing, NVMMADistributedLayout=nothing,
        DotOperandLayout=nothing,
        allocate_shared_memory=_allocate, warp_specialize=_together, static_range=range,
        cdiv=lambda a, b: -(-a // b), cast=lambda x, dtype: x,
        minimum=_scalars(torch.minimum, min), maximum=_scalars(torch.maximum, max),
        where=_scalars(torch.where, lambda c, a, b: a if c else b),
        arange=lambda a, b, layout=None: torch.arange(a, b),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        zeros_like=torch.zeros_like, fma=lambda x, y, z: x * y + z,
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        reshape=lambda x, shape: x.reshape(shape), convert_layout=lambda x, layout: x,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2, exp=torch.exp, log=torch.log, abs=torch.abs, sqrt=torch.sqrt,
        load=lambda address, mask=True, other=0: address.load(mask, other), store=_store,
    )  # fmt: skip


_ASSEMBLY: dict[str, Any] = {
    "anew": lambda x: x,
    "await_hulls": lambda: None,
    "unpacked": lambda p, *_: p,
    "widened": lambda c: c.float(),
    "ones": lambda count: (1 << count.clamp(max=32).long()) - 1,
    "nothing": torch.zeros_like,
    "tanh": lambda x, _: torch.tanh(x),
    "sigmoid": torch.sigmoid,
}


def _rounding(dtype: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    return lambda weights, _: weights.to(dtype)


def run(text: str, grid: int, arguments: dict[str, Any]) -> None:
    """Run the kernel of the module ``text`` in ``grid`` programs, one after the other."""
    body = text[text.index("@gluon.jit\ndef place(") : text.index("#: How blocks of so many rows")]
    helpers = re.findall(
        r"@gluon\.jit\ndef (?:modulo|floor_divide|band|scale|along|within|powers)\(.*?\n\n\n", text, re.DOTALL
    )
    body = re.sub(r"@gluon\.jit.*\n", "", "".join(helpers) + body)
    # In place, PyTorch's tensors keep their shapes.
    body = re.sub(r"kept &= (.*)", r"kept = kept & (\1)", body)
    body = re.sub(r"\.type\.layout|\.to\(gl\.int(32|64)\)", "", body)
    for program in range(grid):
        names: dict[str, Any] = {
            "gl": _language(program, grid),
            "mbarrier": SimpleNamespace(
                init=lambda barrier, count: barrier.init(count),
                wait=lambda barrier, phase, pred=True: barrier.wait(phase, pred),
                expect=lambda barrier, size: barrier.change(1, size),
                arrive=lambda barrier, count, pred=True: barrier.change(count if pred else 0, 0),
                MBarrierLayout=lambda: None,
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=_load_shared,
                async_copy_shared_to_global=_store_shared,
                store_wait=lambda pending: None,
            ),
            "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=False: Product(a, b, acc, use_acc),
            "warpgroup_mma_wait": _wait,
            "fence_async_shared": lambda: None,
        }
        exec(body, names)
        names |= _ASSEMBLY | {"programs": lambda _: grid, "packed": _rounding(arguments["v_source"].dtype)}
        names["attention_kernel"](**{k: v for k, v in arguments.items() if k not in ("num_warps", "launch_pdl")})


class Emulated:
    """Stands for the main kernel of the module ``text``, with the parameters of the generated one."""

    def __init__(self, text: str, parameters: list[str]) -> None:
        self.text, self.parameters = text, parameters

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*arguments: Any, **options: Any) -> None:
            given = dict(zip(self.parameters, arguments, strict=False)) | options
            pointers = {n: Pointer(v) for n, v in given.items() if n.endswith("_ptr")}
            run(self.text, grid[0], given | pointers)

        return launched
