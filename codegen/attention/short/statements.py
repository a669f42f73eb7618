"""The statements of a kernel for few keys that read its operands, each with the axes that it changes along.

Statements that don't change along the axis that a program walks stand before its loop, the others inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.frame import both
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.short.config import Config

#: The axis of the batch or of the rows, by what a program walks.
WALKED: Final = {"batch": "b", "rows": "i"}
EVERYWHERE: Final = "bi"

_ROWS: Final = """\
rows = first + row
# Rows beyond the end repeat the last one, so that nothing outside the tensors is read.
i = tl.minimum(rows, Sq - 1)
first_wide = tl.cast(first, tl.int64)
offset = (i - first).to(d.dtype)"""


@dataclass(frozen=True, slots=True)
class Statement:
    """Lines of a kernel; ``axes`` are those of ``"b"`` and ``"i"`` that what they compute changes along."""

    axes: str
    text: str


def inside(index: str, width: int) -> str:
    """The condition that keeps ``index`` within a head dimension, where that is padded."""
    return f"{index} < {width}" if width != padded(width) else ""


def places() -> Iterator[Statement]:
    """Where the rows and the results stand."""
    yield Statement("b", "b_wide = tl.cast(b, tl.int64)")
    yield Statement("i", _ROWS)
    yield Statement("i", "out_tile = rows.to(tl.int64) * out_stride_i + e[None, :]")


def queries_and_keys(config: Config, head_dim: int) -> Iterator[Statement]:
    """The reads of one block of queries and of every piece of keys."""
    kept = inside("d[None, :]", head_dim)
    mask = f", mask={kept}, other=0.0" if kept else ""
    yield Statement("i", "q_tile = first_wide * q_stride_i + (offset * q_stride_i + d[None, :] * q_stride_d)")
    yield Statement(EVERYWHERE, f"q = tl.load(q_ptr + b_wide * q_stride_b + h_wide * q_stride_h + q_tile{mask})")
    yield Statement("b", "k_base = k_ptr + b_wide * k_stride_b + g_wide * k_stride_h")
    for n in range(len(config.pieces)):
        kept = both(f"j_{n} < Sk", inside("d[:, None]", head_dim))
        yield Statement("", f"k_{n}_tile = n_{n}[None, :] * k_stride_j + d[:, None] * k_stride_d")
        yield Statement("b", f"k_{n} = tl.load(k_base + k_{n}_tile, mask={kept}, other=0.0)")


def values(config: Config, value_dim: int) -> Iterator[Statement]:
    """The reads of every piece of values."""
    yield Statement("b", "v_base = v_ptr + b_wide * v_stride_b + g_wide * v_stride_h")
    for n in range(len(config.pieces)):
        kept = both(f"n_{n}[:, None] < Sk", inside("e[None, :]", value_dim))
        yield Statement("", f"v_{n}_tile = n_{n}[:, None] * v_stride_j + e[None, :] * v_stride_e")
        yield Statement("b", f"v_{n} = tl.load(v_base + v_{n}_tile, mask={kept}, other=0.0)")


def captured(tensor: CapturedTensor, config: Config) -> Iterator[Statement]:
    """The reads of a captured tensor: one, or one for each piece of keys."""
    name = tensor.name
    axes = captured_axes(tensor.capture.dims, config)
    # Batch entries that one program walks lie a multiple of every period apart.
    base = tensor.head_address("lane_wide" if config.walk == "batch" else "b_wide")
    row = f"offset * {name}_stride_i"
    if "i" in tensor.axes:
        base += f" + first_wide * {name}_stride_i"
    yield Statement(axes, f"{name}_base = {base}")
    if not tensor.in_loop:
        yield Statement(
            axes, f"{name} = {tensor.load(f'{name}_base + {row}' if 'i' in tensor.axes else f'{name}_base')}"
        )
        return
    for n in range(len(config.pieces)):
        key = f"n_{n}[None, :] * {name}_stride_j"
        tile = f"{row} + {key}" if "i" in tensor.axes else key
        yield Statement(axes.replace("b", ""), f"{name}_{n}_tile = {tile}")
        yield Statement(
            axes, f"{name}_{n} = {tensor.load(f'{name}_base + {name}_{n}_tile', f', mask=j_{n} < Sk, other=0')}"
        )


def captured_axes(dims: str, config: Config) -> str:
    """The axes that a captured tensor changes along; a periodic one is the same in all steps along the batch."""
    batch = "b" if dims[0] == "b" or (dims[0] == "p" and config.walk == "rows") else ""
    return batch + ("i" if dims[2] == "i" else "")
