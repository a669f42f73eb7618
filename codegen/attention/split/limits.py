"""Which blocks of keys a split kernel visits: the bounds of the mask that hold for all heads and queries of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.codegen.attention.interval import Bound, KeyRange, key_range
from fxopt.codegen.attention.portable.loops import start_text, stop_text
from fxopt.codegen.printing import emit
from fxopt.codegen.template import listing
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, conjuncts


@dataclass(frozen=True)
class Limits:
    """The text that computes the blocks of one batch, or of a vector of batches."""

    spec: AttentionSpec

    @cached_property
    def _range(self) -> KeyRange:
        """The bounds that serve; all of the mask is evaluated in every block, whatever they are."""
        terms = conjuncts(self.spec.mask)
        found = (b for term in terms for b in key_range(dataclasses.replace(self.spec, mask=term)).bounds)
        return KeyRange(tuple(b for b in found if not self._reads_head(b)), ())

    def _reads_head(self, bound: Bound) -> bool:
        reads = "h" in self._symbols(bound.offset)
        return reads or any(c.capture.dims[1] == "h" for c in self._captures_of(bound))

    @cached_property
    def _captures(self) -> tuple[CapturedTensor, ...]:
        found = {c.index: c for bound in self._range.bounds for c in self._captures_of(bound)}
        return tuple(found[index] for index in sorted(found))

    def _captures_of(self, bound: Bound) -> tuple[CapturedTensor, ...]:
        read = {int(leaf.value or 0) for leaf in bound.offset.walk() if leaf.op == "capture"}
        return tuple(c for c in captured_tensors(self.spec) if c.index in read)

    @staticmethod
    def _symbols(expr: Expr) -> set[str]:
        return {str(leaf.value) for leaf in expr.walk() if leaf.op == "symbol"}

    @cached_property
    def uneven(self) -> bool:
        """Whether batches may differ."""
        by_index = any("b" in self._symbols(bound.offset) for bound in self._range.bounds)
        return by_index or any(c.capture.dims[0] != "-" for c in self._captures)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters after ``b``, which is one where batches differ."""
        read = (name for c in self._captures for name in (f"{c.name}_ptr", *c.strides, *c.period))
        return (*read, "Sq", "Sk", "BLOCK_N")

    @property
    def holes(self) -> dict[str, str]:
        """The holes of the template."""
        batch = ("b",) if self.uneven else ()
        lines = [stop_text(self._range, self._emit)]
        if self._range.side("lower"):
            lines.append(start_text(self._range, self._emit))
            # Blocks beyond the end would be read outside the tensors.
            lines.append("origin = tl.minimum(start_block, (Sk - 1) // BLOCK_N * BLOCK_N)")
        else:
            lines.append("origin = 0")
        wide = ["b_wide = b.to(tl.int64)"] if any(c.capture.dims[0] != "-" for c in self._captures) else []
        return {
            "limits_of": "batch ``b``" if self.uneven else "all batches",
            "limits_parameters": listing((*batch, *self.names), annotate=True),
            "limits_arguments": listing((*batch, *self.names)),
            "limits_arguments_of_all": listing(("tl.minimum(batches, batch - 1)", *self.names)),
            "limits_captures": "\n".join((*wide, *(c.gathered_base for c in self._captures))),
            "limits": "\n".join(lines),
        }

    def _emit(self, expr: Expr, names: Mapping[str, str] = MappingProxyType({})) -> str:
        return emit(expr, names, self.spec.capture_kinds)
