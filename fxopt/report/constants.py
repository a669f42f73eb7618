"""Constants of a graph on their way into a dump: short ones as literals, long ones as raw little-endian bytes."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.errors import DumpError
from fxopt.report.literal import literal

_LONGEST_LITERAL: Final = 64
_LITERAL_DTYPES: Final = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)  # fmt: skip


@dataclass
class Constants:
    """The files of raw bytes that the listings of one dump need, by their path in the dump, with dtype and shape."""

    files: dict[str, bytes] = field(default_factory=dict)
    layout: dict[str, dict[str, Any]] = field(default_factory=dict)

    def expression(self, value: torch.Tensor) -> str:
        """The expression that makes ``value`` again in a listing (``load`` and ``random_input`` are defined there)."""
        place = literal(str(value.device))
        if isinstance(value, FakeTensor) or value.layout is not torch.strided or value.is_meta:
            sizes, strides = tuple(value.shape), tuple(torch.empty(value.shape, device="meta").stride())
            return f"random_input({literal(sizes)}, {literal(strides)}, {value.dtype}, {place})"
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if plain.numel() == 0:
            return f"torch.empty({literal(tuple(plain.shape))}, dtype={plain.dtype}, device={place})"
        if plain.numel() <= _LONGEST_LITERAL and plain.dtype in _LITERAL_DTYPES:
            return f"torch.tensor({literal(plain.tolist())}, dtype={plain.dtype}, device={place})"
        return f"load({literal(self._store(plain))}, {plain.dtype}, {literal(tuple(plain.shape))}, {place})"

    def _store(self, value: torch.Tensor) -> str:
        if sys.byteorder != "little":
            raise DumpError("constants are stored as little-endian bytes, which this machine does not use")
        data = ctypes.string_at(value.data_ptr(), value.numel() * value.element_size())
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.bin"
        self.files[f"constants/{name}"] = data
        self.layout[f"constants/{name}"] = {"dtype": str(value.dtype), "shape": list(value.shape)}
        return name
