"""The text of one block of masked logits: how keys and captured tensors are read, the score and the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.attention.logits import LogitsText
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.tiles import Tiles
from fxopt.codegen.template import listing
from fxopt.ir.attention import AttentionSpec

_LOAD_CONSTANTS: Final = ("BLOCK_N", "EVEN")
_LOGITS_CONSTANTS: Final = ("BLOCK_N", "PRECISION", "FAST_TANH", "EVEN")


@dataclass(frozen=True)
class BlocksText(LogitsText):
    """The pieces for one specification, head dimension and dtype of queries and keys."""

    spec: AttentionSpec
    head_dim: int
    dtype: torch.dtype

    def inside(self, index: str) -> str:
        """The condition on an index along the head dimension, where that is padded."""
        return f"{index} < {self.head_dim}" if self.head_dim != padded(self.head_dim) else ""

    @property
    def holes(self) -> dict[str, str]:
        """The holes of the two functions and of their calls."""
        load = ("k_base", "k_tile", "k_stride_j", "start", "Sk", *(("d",) if self.inside("d") else ()))
        return {
            **self.logits_holes,
            "load_parameters": listing((*load, *_LOAD_CONSTANTS, "BOUNDED"), annotate=True),
            "load_arguments": _passed(load, _LOAD_CONSTANTS),
            "logits_parameters": listing((*self._names, *_LOGITS_CONSTANTS, "BOUNDED"), annotate=True),
            "logits_arguments": _passed(self._names, _LOGITS_CONSTANTS),
            "load_k": Tiles(False, self.inside("d[:, None]"), "").load("k"),
        }

    @property
    def _names(self) -> tuple[str, ...]:
        captures = (name for c in self.captures for name in c.attend_names)
        symbols = (name for name in ("b", "h", "i", "Sq") if name in self.symbols_read)
        return ("q", "k", *captures, "start", *symbols, "Sk")


def _passed(names: tuple[str, ...], constants: tuple[str, ...]) -> str:
    return listing((*names, *(f"{name}={name}" for name in constants)))
