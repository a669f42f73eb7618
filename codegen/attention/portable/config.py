"""How a generated attention kernel is cut into blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from fxopt.errors import LoweringError

_TEXT: Final = re.compile(r"(\d+)x(\d+)w(\d+)s(\d+)(?:r(\d+))?(tma)?(list)?")
#: Largest shared memory of one block in bytes, by compute capability (others: 99 KiB, what every later one has).
_SHARED: Final[dict[tuple[int, int], int]] = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
_SHARED_DEFAULT: Final = 101_376
CANDIDATES: Final = 4
#: Registers of a multiprocessor, and those of a thread beside its logits and results.
_REGISTERS, _OTHER_REGISTERS = 65_536, 60
Loads = Literal["pointer", "tma"]
#: The largest part of a captured tensor that a block update reads: nothing, a vector along the keys, or a tile.
Captured = Literal["nothing", "vector", "tile"]


@dataclass(frozen=True, slots=True)
class Config:
    """``block_m`` query rows against ``block_n`` keys at a time, by ``num_warps`` warps, ``num_stages`` loads deep.

    ``registers`` caps those of a thread, so that more blocks share a multiprocessor (0: no cap). ``loads`` says how
    keys and values are read: by pointers, or by tensor descriptors, for compute capability 9.0 and later. ``listed``
    kernels go through a list of the blocks of keys that the mask keeps (`fxopt.codegen.attention.portable.key_lists`).
    Prints as ``128x64w8s3``, with its cap ``128x64w8s2r128``, by descriptors ``128x64w8s3tma``, with lists
    ``128x64w8s3list``; `read_config` is the inverse.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int = 0
    loads: Loads = "pointer"
    listed: bool = False

    def __post_init__(self) -> None:
        sizes = (self.block_m, self.block_n, self.num_warps, self.num_stages)
        powers = all(n > 0 and n & (n - 1) == 0 for n in sizes[:3])
        if not powers or min(self.block_m, self.block_n) < 16 or self.num_stages < 1:
            raise LoweringError(f"{self} is not a kernel configuration: blocks are powers of two from 16, warps of two")
        if self.registers % 8 or not 0 <= self.registers <= 255 or self.loads not in get_args(Loads):
            raise LoweringError(f"{self} is not a kernel configuration: registers are a multiple of 8 below 256")

    def __str__(self) -> str:
        blocks = f"{self.block_m}x{self.block_n}w{self.num_warps}s{self.num_stages}"
        loads = "tma" if self.loads == "tma" else ""
        return f"{blocks}{f'r{self.registers}' if self.registers else ''}{loads}{'list' if self.listed else ''}"


def read_config(text: str) -> Config:
    """Read what ``str(Config)`` printed; raises `LoweringError` on anything else."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise LoweringError(f"not a kernel configuration: {text!r}; an example is '128x64w8s3'")
    block_m, block_n, num_warps, num_stages, registers = (int(n or 0) for n in match.groups()[:5])
    loads: Loads = "tma" if match[6] else "pointer"
    return Config(block_m, block_n, num_warps, num_stages, registers, loads, match[7] is not None)


#: Best first as measured on an H100, by padded head dimension. Caps on registers let two blocks of eight warps, or four
#: of four, share a multiprocessor, whose tensor cores would idle through the softmax of a single one. The last ones are
#: for few rows.
_HOPPER: Final[dict[int, tuple[str, ...]]] = {
    16: ("128x128w4s3", "128x64w4s3", "64x64w4s3", "16x64w4s3"),
    32: ("128x128w4s3", "128x64w4s3", "64x64w4s3", "16x64w4s3"),
    64: ("64x64w4s3r128", "64x128w4s2r168tma", "128x64w4s3", "128x64w8s3r128", "16x64w4s3"),
    128: ("64x64w4s3", "128x64w8s2r128tma", "128x64w8s3", "128x128w8s2tma", "16x64w4s3"),
    256: ("128x64w8s2tma", "128x64w8s2", "64x32w4s3", "128x32w8s2", "16x32w4s2"),
}
#: The same where a captured tensor varies with both row and key: its blocks take shared memory too.
_HOPPER_TILES: Final[dict[int, tuple[str, ...]]] = {
    64: ("128x64w8s3", "128x64w4s3", "64x64w4s2r128", "128x64w8s2r128", "16x64w4s3"),
    128: ("128x64w8s3", "64x32w4s3", "128x32w8s2r128", "64x64w4s2", "16x64w4s3"),
}
#: The same where captured vectors vary with the key: wide blocks of keys on few warps spill then.
_HOPPER_VECTORS: Final[dict[int, tuple[str, ...]]] = {
    64: ("64x64w4s3r128", "128x64w4s3", "64x64w4s3r128tma", "128x64w8s3r128", "16x64w4s3"),
}
_BLACKWELL: Final[dict[int, tuple[str, ...]]] = {
    16: ("128x128w4s3", "128x64w4s3", "64x64w4s3", "16x64w4s3"),
    32: ("128x128w4s3", "128x64w4s3", "64x64w4s3", "16x64w4s3"),
    64: ("128x128w8s3", "128x64w4s3", "128x128w4s3", "64x64w4s3", "16x64w4s3"),
    128: ("128x64w8s3", "64x64w4s3", "64x32w4s3", "16x64w4s3"),
    256: ("128x64w8s2", "128x32w8s2", "64x32w4s3", "32x64w4s3"),
}
_HALF_SM80: Final[dict[int, tuple[str, ...]]] = {
    16: ("128x64w4s3", "64x64w4s3", "16x64w4s3"),
    32: ("128x64w4s3", "64x64w4s3", "16x64w4s3"),
    64: ("128x64w4s3", "64x64w4s3", "16x64w4s3"),
    128: ("128x64w8s3", "64x64w4s3", "64x32w4s3", "16x64w4s2"),
    256: ("64x32w4s2", "32x32w4s2", "16x32w4s2"),
}
#: The same where a captured tensor varies with both row and key: those that don't spill.
_SM80_TILES: Final[dict[int, tuple[str, ...]]] = {
    64: ("64x64w4s3", "128x64w8s3", "16x64w4s3"),
    128: ("128x64w8s3", "64x64w8s3", "64x32w4s3", "16x64w4s2"),
}
#: With dropout, whose random words take registers: those that don't spill.
_HOPPER_DROPPING: Final[dict[int, tuple[str, ...]]] = {
    16: ("64x64w4s3", "16x64w4s3"),
    32: ("64x64w4s3", "16x64w4s3"),
    64: ("64x64w4s3", "128x64w8s3", "64x32w4s3", "16x64w4s3"),
    128: ("128x64w8s3", "64x64w4s3", "16x64w4s3"),
    256: ("128x32w8s2", "16x32w4s2"),
}
_SM80_DROPPING: Final[dict[int, tuple[str, ...]]] = {
    16: ("64x64w4s3", "16x64w4s3"),
    32: ("64x64w4s3", "16x64w4s3"),
    64: ("64x64w8s3", "32x64w4s3", "16x64w4s3"),
    128: ("32x64w8s2", "16x64w4s2"),
    256: ("16x32w4s2",),
}
_BLACKWELL_DROPPING: Final[dict[int, tuple[str, ...]]] = {
    16: ("64x64w4s3", "16x64w4s3"),
    32: ("64x64w4s3", "16x64w4s3"),
    64: ("64x64w4s3", "16x64w4s3"),
    128: ("64x32w4s3", "16x64w4s3"),
    256: ("32x32w4s2", "16x32w4s2"),
}
_SINGLE: Final[dict[int, tuple[str, ...]]] = {
    16: ("64x32w4s2", "32x32w4s2", "16x32w4s2"),
    32: ("64x32w4s2", "32x32w4s2", "16x32w4s2"),
    64: ("32x32w4s2", "64x32w8s2", "16x32w4s2"),
    128: ("32x32w8s2", "16x32w4s2"),
    256: ("32x16w8s1", "16x16w4s1"),
}


def padded(width: int) -> int:
    """The power of two, from 16, that a head dimension is padded to."""
    return max(16, 1 << (width - 1).bit_length())


def shared_limit(capability: tuple[int, int]) -> int:
    """Largest shared memory of one block in bytes on a device of this compute capability."""
    return _SHARED.get(capability, _SHARED_DEFAULT)


def widened(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``x [..., E]``, padded with zeros where its block would be narrower than that of keys of ``head_dim``.

    Triton 3.6.0 miscompiles the masked last block of keys then (sm_90, bfloat16: wrong sums, reads out of bounds).
    """
    if x.shape[3] >= head_dim:
        return x
    missing = padded(head_dim) - x.shape[3]
    return torch.nn.functional.pad(x, (0, missing)) if padded(x.shape[3]) < padded(head_dim) else x


def shared_bytes(config: Config, head_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Shared memory that the query block and the key and value blocks in flight take."""
    rows = config.block_m * padded(head_dim)
    keys = config.num_stages * config.block_n * (padded(head_dim) + padded(value_dim))
    return (rows + keys) * dtype.itemsize


def resident(config: Config, head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """How many programs share a multiprocessor, as far as their registers can be told: logits, results and others."""
    threads = 32 * config.num_warps
    held = config.block_m * (padded(value_dim) + config.block_n) // threads + _OTHER_REGISTERS
    by_registers = _REGISTERS // (threads * (config.registers or min(held, 255)))
    by_memory = shared_limit(capability) // shared_bytes(config, head_dim, value_dim, dtype)
    return max(1, min(by_registers, by_memory))


def fitting(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    captured: Captured = "nothing",
    rows: int | None = None,
    drops: bool = False,
) -> tuple[Config, ...]:
    """The configurations for these sizes that fit the device, best first, at most four; none for other dtypes.

    ``captured`` says what a block update reads of captured tensors, ``drops`` whether it drops weights. Blocks that
    ``rows`` queries leave mostly idle come last.
    """
    width = max(padded(head_dim), padded(value_dim))
    half = _dropping(capability) if drops else _half(capability, captured)
    table = {torch.bfloat16: half, torch.float16: half, torch.float32: _SINGLE}.get(dtype, {})
    limit = shared_limit(capability)
    configs = (read_config(text) for text in table.get(width, ()))
    fit = [c for c in configs if shared_bytes(c, head_dim, value_dim, dtype) <= limit]
    if rows is not None:
        fit.sort(key=lambda c: -(-rows // c.block_m) * c.block_m > 2 * max(rows, 16))
    return tuple(fit[:CANDIDATES])


def _dropping(capability: tuple[int, int]) -> dict[int, tuple[str, ...]]:
    if capability < (9, 0):
        return _SM80_DROPPING
    return _BLACKWELL_DROPPING if capability[0] > 9 else _HOPPER_DROPPING


def _half(capability: tuple[int, int], captured: Captured) -> dict[int, tuple[str, ...]]:
    if capability < (9, 0):
        return _HALF_SM80 | (_SM80_TILES if captured == "tile" else {})
    if capability[0] > 9:
        return _BLACKWELL
    tables = {"nothing": {}, "vector": _HOPPER_VECTORS, "tile": _HOPPER_TILES}
    return _HOPPER | tables[captured]
