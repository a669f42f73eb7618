"""The inner loops of a generated backward: what a block of keys does to rows, and a block of rows to keys."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fxopt.codegen.attention.backward import plan
from fxopt.codegen.attention.backward.captured_by_key import CapturedByKey, captured_by_key
from fxopt.codegen.attention.backward.diagonals import (
    DIAGONAL_LOOP,
    diagonal_range_text,
    diagonal_spans,
    fixed_bases,
    moving_bases,
)
from fxopt.codegen.attention.backward.plan import Flow, Weights
from fxopt.codegen.attention.backward.row_range import row_spans
from fxopt.codegen.attention.backward.template import BY_ROW, COUNT_FLOW, LAST, LOOP, UPDATE
from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.dropout import Dropout
from fxopt.codegen.attention.interval import KeyRange, key_range
from fxopt.codegen.attention.portable.key_lists import KeyLists
from fxopt.codegen.attention.portable.loops import Span, loop_spans
from fxopt.codegen.attention.portable.phases import PhasedBand, phased
from fxopt.codegen.printing import emit
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, S, conjunction, conjuncts

_SWITCHES: Final = ("PRECISION", "FAST_TANH", "EVEN")
_LOAD: Final = """\
{0}_block = {0}_base + tl.cast(start, tl.int64) * {0}_stride_j
if BOUNDED and not EVEN:
    {0} = tl.load({0}_block + {0}_tile, mask={1}, other=0.0)
else:
    {0} = tl.load({0}_block + {0}_tile{2})"""

_FLOW_DELTA: Final = """\
precise = flow / total
if WITH_DLSE:
    precise -= tl.load(dlse_ptr + row)
delta = tl.where(far, precise, delta)"""


@dataclass(frozen=True)
class Folds:
    """The text of the inner loops for one specification.

    ``d_inside`` and ``e_inside`` are the conditions on the head dimensions, empty where those need no padding. With
    ``lists``, of blocks of keys and of rows, the loops go through these.
    """

    spec: AttentionSpec
    weights: Weights
    flows: tuple[Flow, ...]
    d_inside: str
    e_inside: str
    peeled: bool
    lists: tuple[KeyLists, KeyLists] | None = None

    @cached_property
    def range(self) -> KeyRange:
        """Which keys the rows need, as far as bounds limit the loops."""
        return KeyRange((), ()) if self.lists else key_range(self.spec)

    @cached_property
    def captures(self) -> tuple[CapturedTensor, ...]:
        """The captured tensors as the kernels that keep rows read them."""
        return phased(self.spec)

    @cached_property
    def by_key(self) -> tuple[CapturedByKey, ...]:
        """The captured tensors as the kernel that keeps keys reads them."""
        return tuple(captured_by_key(c) for c in self.captures)

    @cached_property
    def slope(self) -> tuple[Expr | None, float]:
        """The derivative of the score by ``s``: an expression and a factor."""
        return plan.slope(self.spec)

    @property
    def _dropout(self) -> Dropout:
        return Dropout(self.spec)

    @property
    def _drop_dp(self) -> str:
        """The lines that leave of ``dp`` what belongs to weights that stay."""
        return f"{self._dropout.stay()}\n{self._dropout.drop_scaled('dp')}".strip()

    def emit(self, expr: Expr) -> str:
        """An expression as it stands in a kernel."""
        return emit(expr, {}, self.spec.capture_kinds)

    @property
    def holes(self) -> dict[str, str]:
        """The holes of the update functions and of the loops that call them."""
        rows, keys = self._sums("rows"), self._sums("keys")
        rest = {
            "ds": "dx" if self.slope[0] is None else "ds",
            "slope": "" if self.slope[0] is None else f"ds = dx * ({self.emit(self.slope[0])})",
            "row_sums": "\n".join(self._row_sums(rows)),
            "key_sums": "\n".join(f"{f.name}_sum += tl.sum(dx * ({self.emit(f.slope)}), 1)" for f in keys),
            "row_zeros": "\n".join(f"{name} = tl.zeros([BLOCK_M], tl.float32)" for name in self._targets("rows")[1:]),
            "key_zeros": "\n".join(f"{name} = tl.zeros([BLOCK_N], tl.float32)" for name in self._targets("keys")[2:]),
            "rows_returned": ", ".join(self._targets("rows")),
            "keys_returned": ", ".join(self._targets("keys")),
            "rows_parameters": self._parameters((*self._targets("rows"), *self._row_names), "BLOCK_N"),
            "keys_parameters": self._parameters((*self._targets("keys"), *self._key_names), "BLOCK_M"),
            "loops_over_keys": self._loops("keys"),
            "loops_over_rows": self._loops("rows"),
            "load_captures_by_key": "\n".join(c.load_in_loop for c in self.by_key if c.in_loop),
            "masks_by_key": self._masks("i < Sq"),
            "weight_by_key": self.weights.text.format("[None, :]"),
            "stay": self._dropout.stay(by_key=True),
            "drop_dp_by_key": self._dropout.drop_scaled("dp"),
            "used": self._dropout.dropped("p"),
            "load_rows": self._load_rows,
            "capture_bases_by_key": "\n".join(c.base for c in self.by_key),
        }
        shared = self._by_row
        return {**shared, **rest, "by_row": fill(BY_ROW, shared).rstrip("\n"), **self._counting}

    @property
    def _by_row(self) -> dict[str, str]:
        return {
            "load_k": self._load("k", self.d_inside),
            "load_v": self._load("v", self.e_inside),
            "load_captures": "\n".join(c.load_in_loop for c in self.captures if c.in_loop),
            "score": self.emit(self.weights.inner),
            "widen": "" if self.weights.inner.reads(S) else "x = tl.zeros_like(s) + x",
            "masks": self._masks("j < Sk"),
            "weight": self.weights.text.format("[:, None]"),
            "drop_dp": self._drop_dp,
            "mask_dx": self._mask_dx,
            "row_statistics": self._statistics("row", "").replace("\n\n", "\n"),
        }

    @property
    def _counting(self) -> dict[str, str]:
        """The holes of the pass that counts rows again; for float32 inputs it computes delta as well."""
        exact = self.weights.exact
        counted = ("peak", "total", "flow") if exact else ("peak", "total")
        values = ("dout", "v_base", "v_tile", "v_stride_j") if exact else ()
        names = (*counted, "q", "k_base", "k_tile", "k_stride_j", *values, *self._row_symbols)
        load_v = {"load_v": self._load("v", self.e_inside), "drop_dp": self._drop_dp}
        return {
            "count_parameters": self._parameters(names, "BLOCK_N"),
            "count_arguments": self._arguments(names, "BLOCK_N", bounded=True),
            "counted": ", ".join(counted),
            "count_returned": ", ".join(("highest", *counted[1:])),
            "count_flow": fill(COUNT_FLOW, load_v).rstrip("\n") if exact else "",
            "flow_zeros": "flow = tl.zeros([BLOCK_M], tl.float32)" if exact else "",
            "flow_delta": _FLOW_DELTA if exact else "",
        }

    def table_holes(self, flow: Flow) -> dict[str, str]:
        """The holes of the kernel that computes the gradient of one captured tensor per row and key."""
        names = ("grad", *self._row_names)
        update = f"grad = fold_{flow.name}(\n{_indented(self._arguments(names, 'BLOCK_N', bounded=True))}\n)"
        visited = ["start < stop"] * bool(self.range.side("upper"))
        visited += ["start >= start_block"] * bool(self.range.side("lower"))
        if visited:
            update = f"if {' & '.join(f'({test})' for test in visited)}:\n{_indented(update)}"
        parameters = self._parameters(names, "BLOCK_N")
        return {**self._kept(flow), "table_parameters": parameters, "table_update": update}

    def band_holes(self, flow: Flow, holes: Mapping[str, str]) -> dict[str, str]:
        """The holes of the kernel that computes the gradient of a band; ``holes`` are those of all kernels."""
        # Along a diagonal the values of bands don't change: they are given instead of read.
        bands = [c for c in self.captures if isinstance(c, PhasedBand)]
        given = {c.attend_names[0]: c.name for c in bands} | {c.attend_names[1]: c.name for c in bands}
        names = dict.fromkeys(("grad", *(given.get(name, name) for name in self._row_names), "rows", "Sq"))
        read = "\n".join(c.load_in_loop for c in self.captures if c.in_loop and c not in bands)
        found = {
            **self._kept(flow),
            "band_parameters": self._parameters(names, "BLOCK_N"),
            "by_row": fill(BY_ROW, {**self._by_row, "load_captures": read}).rstrip("\n"),
            "fixed_bases": fixed_bases(self.captures),
            "moving_bases": moving_bases(self.captures),
            "diagonal_range": diagonal_range_text(self.range, lambda e, names: emit(e, names, self.spec.capture_kinds)),
        }
        loops = []
        for span in diagonal_spans(self.range):
            arguments = self._arguments(names, "BLOCK_N", span.bounded)
            limits = {"first": span.first, "last": span.last, "arguments": arguments}
            loops.append(fill(DIAGONAL_LOOP, {**holes, **found, **limits}).rstrip("\n"))
        return {**found, "diagonal_loops": "\n".join(loops)}

    def _kept(self, flow: Flow) -> dict[str, str]:
        """What a kernel for one captured tensor is called, and what of batch and heads its gradient keeps."""
        batch, head = flow.how.dims[0], flow.how.dims[1]
        return {
            "name": flow.name,
            "table_slope": f"({self.emit(flow.slope)})",
            "kept_heads": "heads" if head == "h" else "1",
            "kept_batches": {"b": "batch", "p": f"{flow.name}_period", "-": "1"}[batch],
        }

    def _sums(self, side: str) -> list[Flow]:
        return [flow for flow in self.flows if flow.side == side]

    def _targets(self, side: str) -> tuple[str, ...]:
        sums = [f"{flow.name}_sum" for flow in self._sums(side)]
        if side == "keys":
            return ("dk", "dv", *sums)
        means = [f"{flow.name}_mean" for flow in self._sums(side)]
        return ("dq", *sums, *means, *(("dx_sum",) if sums else ()))

    def _row_sums(self, flows: Sequence[Flow]) -> Iterator[str]:
        """The sums over keys that hold gradients, and what `CORRECTION` takes out of them."""
        for flow in flows:
            slope = self.emit(flow.slope)
            yield f"{flow.name}_sum += tl.sum(dx * ({slope}), 1)"
            yield f"{flow.name}_mean += tl.sum(p * ({slope}), 1)"
        if flows:
            yield "dx_sum += tl.sum(dx, 1)"

    @property
    def _row_symbols(self) -> tuple[str, ...]:
        padding = ("d",) * bool(self.d_inside) + ("e",) * bool(self.e_inside)
        names = (name for c in self.captures for name in c.attend_names)
        symbols = (*self._symbols("b", "h", "i", "Sq"), "Sk", "start")
        return tuple(dict.fromkeys((*names, *padding, *symbols, *self._dropout.names)))

    @property
    def _row_names(self) -> tuple[str, ...]:
        statistics = ("shift", "count", "delta") if self.weights.recounted else ("shift", "delta")
        bases = ("k_base", "k_tile", "v_base", "v_tile", "k_stride_j", "v_stride_j")
        return ("q", "dout", *statistics, *bases, *self._row_symbols)

    @property
    def _key_names(self) -> tuple[str, ...]:
        padding = ("d",) * bool(self.d_inside) + ("e",) * bool(self.e_inside)
        tiles = ("q_base", "q_tile", "dout_base", "dout_tile", "q_stride_i", "dout_stride_i")
        pointers = ("shift_ptr", "count_ptr") if self.weights.recounted else ("lse_ptr",)
        captures = (name for c in self.by_key for name in c.attend_names)
        symbols = self._symbols("b", "h", "j", "Sk")
        names = ("k", "v", *tiles, *pointers, "delta_ptr", "row_base", *captures, *padding, *symbols, "Sq", "start")
        return tuple(dict.fromkeys((*names, *self._dropout.names)))

    def _symbols(self, *names: str) -> tuple[str, ...]:
        expressions = [self.spec.score, *(f.slope for f in self.flows)]
        expressions += [] if self.spec.mask is None else [self.spec.mask]
        read = {str(leaf.value) for e in expressions for leaf in e.walk() if leaf.op == "symbol"}
        return tuple(name for name in names if name in read)

    def _parameters(self, names: Iterable[str], block: str) -> str:
        return listing((*names, *self._constants(block), "BOUNDED"), annotate=True)

    def _constants(self, block: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys((block, *self._dropout.blocks, *_SWITCHES)))

    def _arguments(self, names: Iterable[str], block: str, bounded: bool) -> str:
        constants = (f"{name}={name}" for name in self._constants(block))
        return listing((*names, *constants, f"BOUNDED={bounded}")).rstrip("\n")

    def _loops(self, over: str) -> str:
        if self.lists is None:
            spans = loop_spans(self.range) if over == "keys" else row_spans(self.range)
            return "\n".join(self._loop(span, over) for span in spans)
        lists = self.lists[over == "rows"]
        updates = {bounded: fill(UPDATE, self._update(over, bounded)).rstrip("\n") for bounded in (True, False)}
        return "\n".join((lists.limits, *(lists.loop(text, bounded) for bounded, text in updates.items())))

    def _loop(self, span: Span, over: str) -> str:
        loops = span.loops or not self.peeled
        update = self._update(over, span.bounded, "start" if loops else span.first)
        holes = {"first": span.first, "last": span.last, "step": "BLOCK_N" if over == "keys" else "BLOCK_M", **update}
        text = fill(LOOP if loops else LAST, holes).rstrip("\n")
        return f"if not EVEN:\n{_indented(text)}" if span.beyond else text

    def _update(self, over: str, bounded: bool, start: str = "start") -> dict[str, str]:
        """The holes of the call that folds the block from ``start`` on."""
        by_row = over == "keys"
        names = (*self._targets("rows"), *self._row_names) if by_row else (*self._targets("keys"), *self._key_names)
        placed = (start if name == "start" else name for name in names)
        return {
            "targets": ", ".join(self._targets("rows" if by_row else "keys")),
            "function": "fold_keys" if by_row else "fold_rows",
            "arguments": self._arguments(placed, "BLOCK_N" if by_row else "BLOCK_M", bounded),
        }

    @staticmethod
    def _load(name: str, inside: str) -> str:
        key = "(start + n)[:, None] < Sk"
        bounded = f"({key}) & ({inside})" if inside else key
        return _LOAD.format(name, bounded, f", mask={inside}, other=0.0" if inside else "")

    @property
    def _load_rows(self) -> str:
        """The lines that read one block of rows: queries, gradients of the result, statistics."""
        inside = [f", mask={x}, other=0.0" if x else "" for x in (self.d_inside, self.e_inside)]
        both = [f"(inside[:, None]) & ({x})" if x else "inside[:, None]" for x in (self.d_inside, self.e_inside)]
        bounded = [
            "inside = start + m < Sq",
            f"q = tl.load(q_block + q_tile, mask={both[0]}, other=0.0)",
            f"dout = tl.load(dout_block + dout_tile, mask={both[1]}, other=0.0)",
            self._loads("row", ", mask=inside, other=0.0"),
        ]
        full = [
            f"q = tl.load(q_block + q_tile{inside[0]})",
            f"dout = tl.load(dout_block + dout_tile{inside[1]})",
            self._loads("row", ""),
        ]
        return "\n".join((
            "row = row_base + start + m",
            "q_block = q_base + tl.cast(start, tl.int64) * q_stride_i",
            "dout_block = dout_base + tl.cast(start, tl.int64) * dout_stride_i",
            "if BOUNDED and not EVEN:",
            _indented("\n".join(bounded)),
            "else:",
            _indented("\n".join(full)),
            *self._scaled,
            "dout = dout.to(v.dtype)",
        ))  # fmt: skip

    def _statistics(self, row: str, mask: str) -> str:
        return "\n".join((self._loads(row, mask), *self._scaled))

    def _loads(self, row: str, mask: str) -> str:
        pointers = {"shift": "shift_ptr", "count": "count_ptr"} if self.weights.recounted else {"shift": "lse_ptr"}
        loads = {**pointers, "delta": "delta_ptr"}
        return "\n".join(f"{name} = tl.load({pointer} + {row}{mask})" for name, pointer in loads.items())

    @property
    def _scaled(self) -> list[str]:
        """What follows the loads of statistics: rows without keys, and the unit of the log-sum-exp."""
        if self.weights.recounted:
            return []
        empty = ['shift = tl.where(shift == float("-inf"), 0.0, shift)'] * plan.empties_without_weights(self.spec)
        return empty + [f"shift = shift * {self.weights.scale!r}"] * (self.weights.scale != 1.0)

    def _masks(self, inside: str) -> str:
        """The lines that set the logits outside the mask; full blocks leave out what bounds the keys."""
        bounded = [f"    kept &= {self.emit(term)}" for term in conjuncts(self.spec.mask)]
        lines = ["if BOUNDED:", f"    kept = {inside}", *bounded, '    x = tl.where(kept, x, float("-inf"))']
        rest = conjunction(self.range.rest)
        if rest is not None:
            lines += ["else:", f"    kept = {self.emit(rest)}", '    x = tl.where(kept, x, float("-inf"))']
        return "\n".join(lines)

    @property
    def _mask_dx(self) -> str:
        """Outside the mask nothing flows, not even from a row whose weights are NaN."""
        masked = "dx = tl.where(kept, dx, 0.0)"
        if self.range.rest and self.spec.empty_rows == "nan":
            return masked
        return f"if BOUNDED:\n    {masked}"


def _indented(text: str) -> str:
    return textwrap.indent(text, "    ")
