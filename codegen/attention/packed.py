"""``fxopt::attention_packed``: an attention whose queries, keys and values are columns of one tensor.

It is ``fxopt::attention_forward`` of three views. Its gradient is one tensor too, whose columns the kernels write: that
of three views would be put together from three tensors, one more walk through all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fxopt.codegen.attention import operator, reference
from fxopt.codegen.attention.backward import operator as backward
from fxopt.codegen.attention.backward.config import split_config
from fxopt.codegen.attention.backward.recompute import gradients
from fxopt.codegen.launching import DECOMPOSITIONS, bare
from fxopt.errors import LoweringError


class Heads(NamedTuple):
    """Where the heads of queries, keys or values lie among the columns: the first one, and from head to head."""

    first: int
    step: int
    number: int


class Places(NamedTuple):
    """Which columns of ``[B, S, W]`` are queries, keys and values, whose heads are ``width`` columns each.

    In ``[B, S, 3, H, D]`` heads of keys begin at column ``H·D`` and are ``D`` apart; in ``[B, S, H, 3, D]`` they begin
    at ``D`` and are ``3·D`` apart.
    """

    width: int
    q: Heads
    k: Heads
    v: Heads

    @property
    def starts(self) -> list[int]:
        """The columns where heads begin, in the order of queries, keys and values."""
        return [x.first + n * x.step for x in self[1:] for n in range(x.number)]

    @property
    def columns(self) -> int:
        """How many columns the heads have together."""
        return self.width * (self.q.number + self.k.number + self.v.number)

    @property
    def whole(self) -> bool:
        """Whether every one of the first `columns` columns belongs to one head."""
        return sorted(self.starts) == list(range(0, self.columns, self.width))

    def numbers(self) -> list[int]:
        """As it stands in graphs; `read_places` is the inverse."""
        return [self.width, *self.q, *self.k, *self.v]


_NUMBERS: Final = 10
_LAUNCH: Final = torch.ops.fxopt.attention_forward_launch.default


def read_places(numbers: Sequence[int]) -> Places:
    """What `Places.numbers` wrote.

    Raises:
        LoweringError: it was not; or there are columns between the heads, or of several.
    """
    return _read_places(tuple(numbers))


@lru_cache(maxsize=256)
def _read_places(numbers: tuple[int, ...]) -> Places:
    if len(numbers) != _NUMBERS:
        raise LoweringError(f"places of queries, keys and values are {_NUMBERS} numbers, not {len(numbers)}")
    width, *rest = numbers
    places = Places(width, Heads(*rest[:3]), Heads(*rest[3:6]), Heads(*rest[6:]))
    if not places.whole:
        raise LoweringError(f"queries, keys and values must have every column, and each once: {places}")
    return places


def unpacked(packed: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, S, D]`` as views of ``packed [B, S, W]``.

    Raises:
        LoweringError: it has not as many columns as there are places.
    """
    if packed.dim() != 3 or packed.shape[2] != places.columns:
        raise LoweringError(f"{places} are of {places.columns} columns, not of {tuple(packed.shape)}")
    batch, length, _ = packed.shape
    along_batch, along_rows, along = packed.stride()
    start = packed.storage_offset()

    def heads(of: Heads) -> Tensor:
        sizes = (batch, of.number, length, places.width)
        strides = (along_batch, of.step * along, along_rows, along)
        return packed.as_strided(sizes, strides, start + of.first * along)

    return heads(places.q), heads(places.k), heads(places.v)


@torch.library.custom_op("fxopt::attention_packed", mutates_args=(), device_types="cpu")
def attention_packed(
    packed: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    places: Sequence[int],
    config: str,
    with_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``fxopt::attention_forward`` gives for the queries, keys and values that ``packed`` consists of.

    Args:
        packed: ``[B, S, W]``, any strides.
        captures: the captured tensors, any strides.
        spec: the printed `AttentionSpec`.
        places: the numbers of `Places`, which have a column of every head for each of ``W``.
        config: the printed configuration, as there.
        with_lse: whether to return the log-sum-exp of the logits.
        seed: ``[1]``, int64, where there is dropout.

    Returns:
        ``out [B, H, S, D]`` as the specification lays it out, and ``lse [B, H, S]`` in float32 (empty without
        ``with_lse``).

    Raises:
        LoweringError: the kernel cannot serve the specification or the operands, or columns are left or read twice.
    """
    views = unpacked(packed, read_places(places))
    found: tuple[Tensor, Tensor] = operator.attention_forward(*views, captures, spec, config, with_lse, seed)
    return found


@attention_packed.register_kernel("cuda")
def on_cuda(
    packed: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    places: Sequence[int],
    config: str,
    with_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `attention_packed` is on CUDA, without PyTorch's layers around it."""
    views = unpacked(packed, read_places(places))
    found: tuple[Tensor, Tensor] = operator.on_cuda(*views, captures, spec, config, with_lse, seed)
    return found


@attention_packed.register_fake
def _fake(
    packed: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    places: Sequence[int],
    config: str,
    with_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    views = unpacked(packed, read_places(places))
    found: tuple[Tensor, Tensor] = operator._fake(*views, captures, spec, config, with_lse, seed)
    return found


@torch.library.custom_op("fxopt::attention_packed_backward", mutates_args=(), device_types="cpu")
def attention_packed_backward(
    packed: Tensor,
    captures: Sequence[Tensor],
    places: Sequence[int],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of ``fxopt::attention_packed``: what ``fxopt::attention_backward`` gives, in one tensor.

    Args:
        packed: ``[B, S, W]``.
        captures: the captured tensors.
        places: the numbers of `Places`.
        out: ``[B, H, S, D]``, what the forward gave.
        lse: ``[B, H, S]``, the log-sum-exp of the logits in float32; empty if the forward did not return it.
        grad_out: ``[B, H, S, D]``, the gradient of ``out``, any strides.
        grad_lse: ``[B, H, S]``, the gradient of ``lse``, if it was read.
        wanted: for each captured tensor, whether it needs a gradient.
        spec: the printed `AttentionSpec`.
        config: the printed configuration of the backward.
        seed: that of the forward, where there is dropout.

    Returns:
        The gradient of ``packed``, in its memory order, and those of the captured tensors that are wanted, contiguous.
    """
    found, into = _gradient(packed, places)
    q, k, v = unpacked(packed, read_places(places))
    given = (q, k, v, captures, out, lse, grad_out, grad_lse, wanted, spec, config, seed)
    computed: list[Tensor] = backward.attention_backward(*given)
    for place, gradient in zip(into, computed[:3], strict=True):
        place.copy_(gradient)
    return [found, *computed[3:]]


@attention_packed_backward.register_kernel("cuda")
def backward_on_cuda(
    packed: Tensor,
    captures: Sequence[Tensor],
    places: Sequence[int],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """What `attention_packed_backward` is on CUDA: kernels write every column of the gradient."""
    found, into = _gradient(packed, places)
    q, k, v = unpacked(packed, read_places(places))
    given = (q, k, v, captures, out, lse, grad_out, grad_lse, wanted, spec, config, seed)
    return [found, *backward.on_cuda(*given, into)[3:]]


def _gradient(packed: Tensor, places: Sequence[int]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Memory for the gradient of ``packed``, and the places of dq, dk and dv in it."""
    found = torch.empty_like(packed)
    return found, unpacked(found, read_places(places))


@attention_packed_backward.register_fake
def _fake_backward(
    packed: Tensor,
    captures: Sequence[Tensor],
    places: Sequence[int],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    spec: str,
    config: str,
    seed: Tensor | None = None,
) -> list[Tensor]:
    rest = [c.new_empty(c.shape) for c, want in zip(captures, wanted, strict=True) if want]
    return [torch.empty_like(packed), *rest]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    packed, captures, spec, places, config, with_lse, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(packed, *output, seed, *captures)
    ctx.spec, ctx.places, ctx.with_lse, ctx.config = spec, places, with_lse, split_config(config)[1]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    packed, out, lse, seed, *captures = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[1]]
    # As many as arguments were given: the last one may have been left out.
    constants = (None,) * (len(ctx.needs_input_grad) - 2)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = grad_lse if ctx.with_lse else None
    if torch.is_grad_enabled():
        # Gradients that are differentiated again need operations that can be.
        views, spec = unpacked(packed, read_places(ctx.places)), reference.specification(ctx.spec)
        *found, dcaptures = gradients(spec, *views, captures, wanted, grad_out, grad_lse, seed)
        return (_together(read_places(ctx.places), found), dcaptures, *constants)
    given = (ctx.places, out, lse, grad_out, grad_lse, wanted, ctx.spec, ctx.config, seed)
    dpacked, *rest = attention_packed_backward(packed, captures, *given)
    left = iter(rest)
    return dpacked, [next(left) if want else None for want in wanted], *constants


def _together(places: Places, found: Sequence[Tensor]) -> Tensor:
    """The gradients of queries, keys and values as one of ``[B, S, W]``, by operations with gradients of their own."""
    heads = [head for gradient in found for head in gradient.unbind(1)]
    return torch.cat([heads[n] for n in sorted(range(len(heads)), key=places.starts.__getitem__)], -1)


attention_packed.register_autograd(_backward, setup_context=_setup_context)


def _of_views(
    packed: Tensor,
    captures: Sequence[Tensor],
    spec: str,
    places: Sequence[int],
    config: str,
    with_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_packed` below autograd: that of views which base compilers know, and make for nothing."""
    width, *where = read_places(places)
    views = (_heads(packed, of, width) for of in where)
    found: tuple[Tensor, Tensor] = _LAUNCH(*views, captures, spec, config, with_lse, seed)
    return found


def _heads(packed: Tensor, of: Heads, width: int) -> Tensor:
    columns, heads = packed.shape[2], packed
    if of.step == width:
        run = packed[..., of.first : of.first + of.number * width]
        heads = run.unflatten(-1, (of.number, width))
    elif of.step * of.number == columns:
        heads = packed.unflatten(-1, (of.number, of.step))[..., of.first : of.first + width]
    else:
        last = of.first + (of.number - 1) * of.step + width
        heads = packed[..., of.first : last].unfold(-1, width, of.step)
    return heads.transpose(1, 2)


DECOMPOSITIONS[torch.ops.fxopt.attention_packed.default] = _of_views
bare("attention_packed_backward", backward_on_cuda, _fake_backward, attention_packed_backward)
