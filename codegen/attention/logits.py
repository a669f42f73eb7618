"""The text of one block of masked logits: captured tensors, the score, the masks and the plan of the exponential."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import torch

from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.codegen.attention.distance import split_distances
from fxopt.codegen.attention.interval import KeyRange, key_range
from fxopt.codegen.attention.softmax import Exponent, exponent
from fxopt.codegen.printing import emit
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, S, capture, conjunction, conjuncts


class LogitsText:
    """The pieces that the source of a kernel for ``spec`` on queries and keys of ``dtype`` is made of."""

    spec: AttentionSpec
    dtype: torch.dtype
    #: Whether its loops understand bounds with alternatives and by chunks.
    further_bounds: ClassVar[bool] = False

    @cached_property
    def captures(self) -> tuple[CapturedTensor, ...]:
        """The captured tensors."""
        return captured_tensors(self.spec)

    @property
    def given(self) -> tuple[CapturedTensor, ...]:
        """Those that every block of keys is given."""
        return self.captures

    @cached_property
    def range(self) -> KeyRange:
        """The bounds that the mask sets."""
        return key_range(self.spec, self.further_bounds)

    @cached_property
    def exponent(self) -> Exponent:
        """The plan of the softmax."""
        return exponent(self.spec, exact=self.dtype is torch.float32)

    @property
    def symbols_read(self) -> frozenset[str]:
        """The symbols that score and mask read."""
        expressions = [e for e in (self.spec.score, self.spec.mask) if e is not None]
        return frozenset(str(leaf.value) for e in expressions for leaf in e.walk() if leaf.op == "symbol")

    @property
    def logits_holes(self) -> dict[str, str]:
        """The holes of the lines from raw products ``s`` to masked logits ``x``, and of what becomes of these."""
        plan = self.exponent
        return {
            "load_captures": "\n".join(c.load_in_loop for c in self.given if c.in_loop),
            "score": self._score,
            "widen": "" if plan.inner.reads(S) else "x = tl.zeros_like(s) + x",
            "masks": self._masks,
            "unit": plan.unit,
            "exponent": plan.text,
            "scale": plan.scale,
        }

    @property
    def _score(self) -> str:
        inner, captures = self.exponent.inner, self.spec.captures
        if self.dtype is torch.float32:
            return self.emit(inner)
        # Two names beyond those of the captured tensors, which the emitter treats alike.
        column, start = capture(len(captures)), capture(len(captures) + 1)
        names = {str(column): "n[None, :].to(tl.float32)", str(start): "start"}
        return emit(split_distances(inner, captures, column, start), names, (*self.spec.capture_kinds, "float", "int"))

    @property
    def _masks(self) -> str:
        """The lines that set the logits outside the mask; full blocks leave out what bounds the keys."""
        bounded = [f"    kept &= {self.emit(term)}" for term in conjuncts(self.spec.mask)]
        lines = ["if BOUNDED:", "    kept = j < Sk", *bounded, '    x = tl.where(kept, x, float("-inf"))']
        rest = conjunction(self.range.rest)
        if rest is not None:
            lines += ["else:", f'    x = tl.where({self.emit(rest)}, x, float("-inf"))']
        return "\n".join(lines)

    def emit(self, expr: Expr, names: Mapping[str, str] = MappingProxyType({})) -> str:
        """``expr`` as text; ``names`` are the variables that hold its leaves."""
        return emit(expr, names, self.spec.capture_kinds)
