"""Captured tensors that vary with the row in a generated Hopper backward: numbers of a block of rows in shared memory.

The group of warps that loads reads them beside its copies, one number to a thread. Groups that multiply have no
registers for addresses of every row, nor for what is read long before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.codegen.attention.backward.captured_by_key import CapturedByKey
from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.gluon import as_gluon

_INTEGERS = {torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8"}


@dataclass(frozen=True, slots=True)
class RowVector(CapturedByKey):
    """A captured tensor of rows, of which shared memory holds those of the blocks in flight."""

    @property
    def attend_names(self) -> tuple[str, ...]:
        """What the update by a block of rows needs of it."""
        return (f"{self.tensor.name}_tiles",)

    @property
    def base(self) -> str:
        """Groups that multiply read nothing before the loop."""
        return ""

    @property
    def load_in_loop(self) -> str:
        """The line that reads one block from shared memory."""
        kept = " != 0" if self.tensor.capture.kind == "bool" else ""
        name = self.tensor.name
        return f"{name} = {name}_tiles.index(slot).load(gl.SliceLayout(0, SCORES))[None, :]{kept}"

    @property
    def allocate(self) -> str:
        """The line that allocates shared memory."""
        name = self.tensor.name
        return f"{name}_tiles = gl.allocate_shared_memory(gl.{self._held}, [STAGES, BLOCK_M], NUMBERS)"

    @property
    def address(self) -> str:
        """The line before the loop of the group that loads: the address for the head."""
        return f"{self.tensor.name}_base = {as_gluon(self.tensor.head_address())}"

    @property
    def read(self) -> str:
        """The line that reads one block of ``rows`` from memory; what lies beyond the end is zero, and masked later."""
        name = self.tensor.name
        address = f"{name}_base + rows.to(gl.int64) * {name}_stride_i"
        return f"{name} = {as_gluon(self.tensor.load(address, ', mask=rows < Sq, other=0'))}"

    @property
    def hold(self) -> str:
        """The line that stores it where the other groups read it."""
        widened = f".to(gl.{self._held})" if self.tensor.capture.kind == "bool" else ""
        return f"{self.tensor.name}_tiles.index(slot).store({self.tensor.name}{widened})"

    @property
    def _held(self) -> str:
        kind = self.tensor.capture.kind
        return _INTEGERS[self.tensor.capture.dtype] if kind == "int" else {"bool": "int32", "float": "float32"}[kind]


def by_key(tensor: CapturedTensor) -> CapturedByKey:
    """How groups that multiply read a captured tensor."""
    return RowVector(tensor) if "i" in tensor.axes else CapturedByKey(tensor)


def row_holes(captures: tuple[CapturedByKey, ...]) -> dict[str, str]:
    """The holes of the templates for those that vary with the row."""
    found = [c for c in captures if isinstance(c, RowVector)]
    lanes = "lanes = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [4], [0]))"
    numbers = "NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])"
    return {
        "row_lanes": lanes if found else "",
        "row_addresses": "\n".join(c.address for c in found),
        "read_rows": "\n".join(["rows = row + lanes"] * bool(found) + [c.read for c in found]),
        "hold_rows": "\n".join([c.hold for c in found] + ["gl.thread_barrier()"] * bool(found)),
        "allocate_rows": "\n".join([numbers] * bool(found) + [c.allocate for c in found]),
    }
