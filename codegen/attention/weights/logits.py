"""The text of one block of masked logits: how keys and captured tensors are read, the score and the masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.codegen.attention.distance import split_distances
from fxopt.codegen.attention.interval import KeyRange, key_range
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.tiles import Tiles
from fxopt.codegen.attention.softmax import Exponent, exponent
from fxopt.codegen.printing import emit
from fxopt.codegen.template import listing
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import S, capture, conjunction, conjuncts

_LOAD_CONSTANTS: Final = ("BLOCK_N", "EVEN")
_LOGITS_CONSTANTS: Final = ("BLOCK_N", "PRECISION", "FAST_TANH", "EVEN")


@dataclass(frozen=True)
class LogitsText:
    """The pieces for one specification, head dimension and dtype of queries and keys."""

    spec: AttentionSpec
    head_dim: int
    dtype: torch.dtype

    @cached_property
    def captures(self) -> tuple[CapturedTensor, ...]:
        """The captured tensors."""
        return captured_tensors(self.spec)

    @cached_property
    def range(self) -> KeyRange:
        """The bounds that the mask sets."""
        return key_range(self.spec)

    @cached_property
    def exponent(self) -> Exponent:
        """The plan of the softmax."""
        return exponent(self.spec, exact=self.dtype is torch.float32)

    def inside(self, index: str) -> str:
        """The condition on an index along the head dimension, where that is padded."""
        return f"{index} < {self.head_dim}" if self.head_dim != padded(self.head_dim) else ""

    @property
    def holes(self) -> dict[str, str]:
        """The holes of the two functions and of their calls."""
        load = ("k_base", "k_tile", "k_stride_j", "start", "Sk", *(("d",) if self.inside("d") else ()))
        return {
            "load_parameters": listing((*load, *_LOAD_CONSTANTS, "BOUNDED"), annotate=True),
            "load_arguments": _passed(load, _LOAD_CONSTANTS),
            "logits_parameters": listing((*self._names, *_LOGITS_CONSTANTS, "BOUNDED"), annotate=True),
            "logits_arguments": _passed(self._names, _LOGITS_CONSTANTS),
            "load_k": Tiles(False, self.inside("d[:, None]"), "").load("k"),
            "load_captures": "\n".join(c.load_in_loop for c in self.captures if c.in_loop),
            "score": self._score,
            "widen": "" if self.exponent.inner.reads(S) else "x = tl.zeros_like(s) + x",
            "masks": self._masks,
        }

    @property
    def _names(self) -> tuple[str, ...]:
        captures = (name for c in self.captures for name in c.attend_names)
        expressions = [e for e in (self.spec.score, self.spec.mask) if e is not None]
        read = {str(leaf.value) for e in expressions for leaf in e.walk() if leaf.op == "symbol"}
        return ("q", "k", *captures, "start", *(name for name in ("b", "h", "i", "Sq") if name in read), "Sk")

    @property
    def _score(self) -> str:
        inner, captures = self.exponent.inner, self.spec.captures
        if self.dtype is torch.float32:
            return emit(inner, {}, self.spec.capture_kinds)
        # Two names beyond those of the captured tensors, which the emitter treats alike.
        column, start = capture(len(captures)), capture(len(captures) + 1)
        names = {str(column): "n[None, :].to(tl.float32)", str(start): "start"}
        return emit(split_distances(inner, captures, column, start), names, (*self.spec.capture_kinds, "float", "int"))

    @property
    def _masks(self) -> str:
        """The lines that set the logits outside the mask; full blocks leave out what bounds the keys."""
        kinds = self.spec.capture_kinds
        bounded = [f"    kept &= {emit(term, {}, kinds)}" for term in conjuncts(self.spec.mask)]
        lines = ["if BOUNDED:", "    kept = j < Sk", *bounded, '    x = tl.where(kept, x, float("-inf"))']
        rest = conjunction(self.range.rest)
        if rest is not None:
            lines += ["else:", f'    x = tl.where({emit(rest, {}, kinds)}, x, float("-inf"))']
        return "\n".join(lines)


def _passed(names: tuple[str, ...], constants: tuple[str, ...]) -> str:
    return listing((*names, *(f"{name}={name}" for name in constants)))
