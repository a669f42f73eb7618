"""Configurations of the kernel of a narrow feed-forward block."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from fxopt.codegen.mlp.narrow_mlp.problem import PIECE, Problem
from fxopt.errors import LoweringError

_FORM: Final = re.compile(r"(\d+)x(\d+)w(\d+)s(\d+)(?:r(\d+))?")

#: Best guess first, by the widest rows that they are for. Of those up to 128 elements wide two programs or more fit on
#: a multiprocessor, so that the products of one go on beside the activations of another (but for the last one of 128);
#: of wider ones a program of 128 rows does, or two of 64. Every program reads all weights again: more rows at a time
#: read less. With three stages the weights of a chunk arrive while the one before is computed; with two they would be
#: waited for. For 96 and 192 elements in the order of an H100 (`benchmarks/results/h100-narrow-mlp.json`).
_ON_HOPPER: Final[dict[int, tuple[str, ...]]] = {
    64: ("128x64w8s3", "64x64w4s3", "128x32w8s3"),
    96: ("64x32w4s3", "128x64w8s3r128", "128x32w8s3"),
    128: ("128x32w8s3", "64x32w4s3", "128x64w8s3"),
    192: ("64x32w4s3", "128x64w8s3", "128x32w8s3"),
}
#: Before Hopper operands of a product are held in registers, of which there are too few for some of these.
_BEFORE_HOPPER: Final = _ON_HOPPER | {96: ("128x32w8s3", "64x32w4s3"), 192: ("128x32w8s3", "64x32w4s3")}
_HOPPER: Final = 90


@dataclass(frozen=True)
class Config:
    """``rows`` of a program, ``chunk`` hidden elements at a time, its warps, the chunks of weights under way, and the
    registers that a thread may have (0: as many as there are).

    Printed as ``128x64w8s2`` and ``128x64w8s2r128``.
    """

    rows: int
    chunk: int
    warps: int
    stages: int
    registers: int = 0

    def __str__(self) -> str:
        limit = f"r{self.registers}" if self.registers else ""
        return f"{self.rows}x{self.chunk}w{self.warps}s{self.stages}{limit}"


def read_config(text: str) -> Config:
    """The inverse of printing.

    Raises:
        LoweringError: ``text`` is no printed configuration.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise LoweringError(f"{text!r} is no configuration of a narrow feed-forward block; they look like 128x64w8s2")
    rows, chunk, warps, stages, registers = (int(part or 0) for part in found.groups())
    if any(number & (number - 1) for number in (rows, chunk, warps)) or min(rows, chunk) < PIECE or not warps:
        raise LoweringError(f"{text!r}: rows, hidden elements and warps must be powers of two, {PIECE} or more a piece")
    return Config(rows, chunk, warps, stages, registers)


def candidates(problem: Problem, architecture: int = _HOPPER) -> tuple[str, ...]:
    """The configurations worth measuring on devices of an architecture (``90`` is sm_90), best guess first."""
    table = _ON_HOPPER if architecture >= _HOPPER else _BEFORE_HOPPER
    widest = max(problem.width, problem.out)
    listed = next(found for most, found in table.items() if widest <= most)
    fitting = [text for text in listed if problem.hidden % read_config(text).chunk == 0]
    # Hidden elements that come in no such number are taken in pieces of sixteen.
    return tuple(fitting) or tuple(_with_chunk(text, PIECE) for text in listed[-1:])


def _with_chunk(text: str, chunk: int) -> str:
    return str(replace(read_config(text), chunk=chunk))
