"""From an attention specification to the source of its Hopper backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward import plan, template
from fxopt.codegen.attention.backward.captured_by_key import CapturedByKey
from fxopt.codegen.attention.backward.config import BackwardConfig
from fxopt.codegen.attention.backward.hopper import finish, listed
from fxopt.codegen.attention.backward.hopper import template as hopper
from fxopt.codegen.attention.backward.hopper.config import Config
from fxopt.codegen.attention.backward.hopper.listed import RowLists
from fxopt.codegen.attention.backward.hopper.masked import distances, masks, named, reads_places
from fxopt.codegen.attention.backward.hopper.needed import Needed, needed_holes, needed_rows
from fxopt.codegen.attention.backward.hopper.order import order_holes
from fxopt.codegen.attention.backward.hopper.row_vectors import by_key, row_holes
from fxopt.codegen.attention.backward.hopper.sloped import Sloped, sloped_weights
from fxopt.codegen.attention.backward.launcher import LAUNCH, MAIN, launch_holes, prepare_text
from fxopt.codegen.attention.backward.row_range import row_range_text
from fxopt.codegen.attention.backward.source import BackwardText
from fxopt.codegen.attention.frame import KV_HEAD
from fxopt.codegen.attention.gluon import as_gluon, named_apart, parameters
from fxopt.codegen.attention.interval import is_uniform
from fxopt.codegen.attention.portable.config import Config as PortableConfig
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.printing import emit, helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, J, S

_ELEMENT: Final = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
#: What the heads that are worked on together read and add to stays in this much of the L2 cache, in bytes.
_L2: Final = "40 * 2**20"
_SIZES: Final = ("heads", "kv_heads", "Sq", "Sk", "blocks", "group", "pairs")
_CONSTANTS: Final = ("BLOCK_M", "WIDTH", "STAGES", "WHOLE")
_BARRIERS: Final = ("q_ready", "dout_ready", "q_free", "dout_free")


@dataclass(frozen=True)
class HopperText(BackwardText):
    """The source for one specification, pair of head dimensions, input dtype, configuration and wanted captures."""

    cut: Config

    def __str__(self) -> str:
        described = {"config": f"{self.cut} (rows x keys, stages)"}
        holes = {**self._description, **described, **self._folds.holes, **self._kernels}
        holes |= self._filled(holes)
        before = fill(template.RECOUNTED, holes) if self.recounted else ""
        before += fill(template.PREPARE, holes)
        before += self._needed.kernel if self._needed else ""
        holes |= needed_holes(self._needed)
        own = {**holes, **self._lists, **self._vectors, **self._fold, **self._around, **self._finish}
        rows = listed.ROWS if self.cut.listed else hopper.ROWS
        parts = (hopper.PLACE, rows, hopper.PRODUCER, hopper.ADD, hopper.FOLD, hopper.CONSUMER, hopper.KERNEL)
        body = "".join(fill(text, own) for text in parts)
        called = [named_apart(as_gluon(text)) for text in helpers(body)]
        functions = [*helpers(before), *called]
        text = fill(hopper.HEADER, own) + "".join(f"\n{function}\n" for function in functions)
        text += before + named_apart(body) + fill(finish.SUMS, own)
        script = {**holes, **self._script}
        return text + fill(LAUNCH, {**own, **launch_holes(self), **self._launch}) + fill(MAIN, script)

    @property
    def spoils(self) -> bool:
        """Whether rows of NaN weights must be told to keys: also where a row without keys is taken to weigh nothing."""
        return super().spoils or self._cleans or self.cut.listed

    @property
    def _empties(self) -> bool:
        return reference.may_be_empty(self.spec)

    @property
    def _cleans(self) -> bool:
        return self._empties and self.spec.empty_rows == "nan"

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the first kernel computes for every row: also the log-sum-exp as the weights take it."""
        return ("delta", *self._statistics)

    @property
    def row_shape(self) -> str:
        """The shape of a tensor of `statistics`: whole blocks of rows."""
        rows = self.cut.rows
        return f"(batch, heads, -(-rows // {rows}) * {rows})"

    @property
    def pointers(self) -> tuple[str, ...]:
        """The tensors that the first kernel takes."""
        return (*super().pointers, "sums")

    @property
    def _stored(self) -> str:
        scale = self._weights.scale
        holes = {
            "read_lse": "" if self.recounted else "shift = tl.load(lse_ptr + row)",
            "finite_shift": 'shift = tl.where(shift == float("-inf"), 0.0, shift)' if self._empties else "",
            "finite_delta": "delta = tl.where(delta == delta, delta, 0.0)" if self._cleans else "",
            "scaled": f" * {scale!r}" if scale != 1.0 else "",
            "store_count": "tl.store(count_ptr + line, tl.where(inside, count, 0.0))" if self.recounted else "",
        }
        return fill(hopper.PREPARED, holes).rstrip("\n")

    @property
    def _statistics(self) -> tuple[str, ...]:
        """What is loaded per row to compute weights anew, besides delta."""
        return ("shift", "count") if self.recounted else ("shift",)

    @cached_property
    def _captured(self) -> tuple[str, ...]:
        """The captured tensors as the kernel takes them: addresses, strides, periods."""
        found = [f"{c.name}_ptr" for c in self._folds.captures]
        found += [f"{self._needed.argument}_ptr"] if self._needed else []
        return (*found, *(name for c in self._folds.captures for name in (*c.strides, *c.period)))

    @cached_property
    def _needed(self) -> Needed | RowLists | None:
        """What tells of the rows that a block of keys needs, beside bounds: captured vectors, or lists."""
        found = RowLists if self.cut.listed else needed_rows
        return found(self.spec, self.cut.rows, self.cut.keys)

    @cached_property
    def _range_names(self) -> tuple[str, ...]:
        """What the range of rows of a block of keys depends on."""
        if self.cut.listed:
            return (listed.NAME,)
        read = {str(leaf) for bound in self._folds.range.bounds for leaf in bound.offset.walk() if not leaf.args}
        captured = (c.name for c in self._folds.captures if c.name in read)
        hull = ("hull_start", "hull_stop") * bool(self._needed)
        return ("first", "last", *(name for name in ("b", "h", "Sk") if name in read), "Sq", *captured, *hull)

    @cached_property
    def _by_key(self) -> tuple[CapturedByKey, ...]:
        """The captured tensors as groups of warps that multiply read them."""
        return tuple(map(by_key, self._folds.captures))

    @property
    def _constants(self) -> tuple[str, ...]:
        return ("GROUP", "KEYS", *_CONSTANTS, *(self._needed.constants if self._needed else ()))

    @property
    def _lists(self) -> dict[str, str]:
        """Parameters and arguments of the functions."""
        vectors = (*self._statistics, "delta")
        sources = ("q_source", "k_source", "v_source", "dout_source", *(f"{name}_source" for name in vectors))
        rows = (name for c in self._by_key if c.in_loop for name in c.attend_names)
        tiles = ("q_tiles", "k_tile", "v_tile", "dout_tiles", *(f"{name}_tiles" for name in vectors), *rows)
        results = ("dk_source", "dv_source")
        signals = ("keys_ready", *_BARRIERS, "stored")
        own = ("ds_tiles", "dq_tiles", "ds_ready", "done", "sums_source")
        common = (*tiles, *signals, *self._captured, *_SIZES, *self._constants)
        load, group = (*sources, *results, *common), (*own, *common)
        members = (fill(hopper.GROUP, {"arguments": listing((n, *group))}).rstrip("\n") for n in "01")
        unspecialized = (*_SIZES, *(p for c in self._folds.captures for p in c.period))
        ranged = (*self._range_names, *(() if self.cut.listed else ("BLOCK_M",)))
        return {
            "load_parameters": parameters(load),
            "load_arguments": listing(load),
            "multiply_parameters": parameters(("MEMBER", *group)),
            "groups": "\n".join(members),
            "gradient_parameters": parameters(
                (*sources, *results, "sums_source", *self._captured, *_SIZES, *self._constants)
            ),
            "unspecialized_sizes": "[" + ", ".join(f'"{name}"' for name in unspecialized) + "]",
            "range_parameters": parameters(ranged),
            "range_arguments": listing(ranged),
        }

    @property
    def _vectors(self) -> dict[str, str]:
        """The holes that have a line for each number of a row."""
        names = self._statistics
        # Others would take registers that rows and keys need.
        early = not any("i" in capture.dims for capture in self.spec.captures)
        aside = self._sloped is not None
        reads = [f"{name} = {name}_tiles.index(slot).load(gl.SliceLayout(0, SCORES))" for name in names]
        return {
            "scored_bytes": f"q_source.block_type.nbytes + {4 * len(names)} * BLOCK_M",
            "flowing_bytes": "dout_source.block_type.nbytes + 4 * BLOCK_M",
            "load_dout": hopper.LOAD_DOUT,
            "load_vectors": _each(hopper.LOAD_VECTOR, names),
            "allocate_vectors": _each(hopper.ALLOCATE_VECTOR, (*names, "delta")),
            "read_early": "\n".join(f"if WHOLE:\n    {line}" if aside else line for line in reads[:early]),
            "read_next": f"if not WHOLE:\n    {reads[0]}" if aside else "",
            "read_late": "\n".join(reads[early:]),
        }

    @property
    def _fold(self) -> dict[str, str]:
        """The holes of the update by a block of rows."""
        slope, _ = self._folds.slope
        found = self._sloped
        inner = self._weights.inner if found is None else found.inner
        weight = as_gluon(self._weights.text.format("[None, :]")) if found is None else found.weight
        vectors = (f"{name}_tiles" for name in (*self._statistics, "delta"))
        tiles = ("q_tiles", "dout_tiles", *vectors, "ds_tiles", "dq_tiles", *_BARRIERS, "ds_ready", "sums_source")
        captures = (name for c in self._by_key for name in c.attend_names)
        symbols = (name for name in ("b", "h", "j") if name in self._read)
        operands = ("step", "k", "v", "k_part", *tiles, *captures, *symbols, "columns")
        state = (*self._folded, "held", *operands, *self._full, "Sq", "Sk")
        constants = ("MEMBER", *_CONSTANTS, "SCORES", "WEIGHTS", "DQ")
        placed = ("line", "row")
        loads = "\n".join(c.load_in_loop for c in self._by_key if c.in_loop)
        loop = {"fold_arguments": listing((*state, *placed, *constants)), "folded": ", ".join(self._folded)}
        return {
            **loop,
            "fold_parameters": parameters((*state, "line", "start", *constants)),
            "loop": fill(listed.LOOP if self.cut.listed else hopper.LOOP, loop).rstrip("\n"),
            "row": listed.ROW if self.cut.listed else "row = entry * BLOCK_M",
            **order_holes(self.cut.ahead),
            "load_captures": loads,
            "score": self._emit(inner),
            "widen": "" if inner.reads(S) else "x = gl.zeros_like(s) + x",
            "distances": distances(self.spec, self._folds.range) if self._apart else "",
            "masks": masks(self._folds.range, self._full, self._apart, self._emit),
            "weight": weight,
            "row_parts": "" if found is None else found.parts,
            "slope": "" if slope is None else f"p = p * ({self._emit(slope)})",
        }

    @cached_property
    def _sloped(self) -> Sloped | None:
        """What is known of weights before products are there, where a multiple of the distance is added to them."""
        return sloped_weights(self.spec, self._weights)

    @cached_property
    def _apart(self) -> bool:
        """Whether keys and rows are told by their distance; registers for it are short where rows are counted too."""
        if self.recounted and padded(self.head_dim) > 64 and self.spec.score.reads(J):
            return False
        return not reads_places(self.spec)

    @property
    def _full(self) -> tuple[str, ...]:
        """Between which rows all keys of a block are needed, as far as the mask bounds them.

        They take registers: where those are few, every block asks the mask.
        """
        found = self._folds.range
        if self.cut.listed:
            return (listed.CUT,) if padded(self.head_dim) <= 64 else ()
        if any(c.in_loop for c in self._by_key) or (
            padded(self.head_dim) > 64 and (self._sloped is not None or not is_light(self.spec, self.dtype))
        ):
            return ()
        starts = any(b.slope for b in found.side("upper"))
        stops = any(b.side == "lower" or not b.slope for b in found.bounds)
        names = ("full_start",) * starts + ("full_stop",) * stops
        return names if len(names) == 1 or padded(self.head_dim) <= 64 else ()

    @property
    def _folded(self) -> tuple[str, ...]:
        """What goes from one block of rows to the next."""
        return ("dk", "dv", "s") if self.cut.ahead else ("dk", "dv")

    @property
    def _around(self) -> dict[str, str]:
        """The holes around the loop."""
        spec, found = self.spec, self._folds.range
        lines = row_range_text(found, lambda e, names: emit(e, names, spec.capture_kinds)).splitlines()
        needed = [line for line in lines if not line.startswith("full_") or line.split()[0] in self._full]
        wide = "b_wide, h_wide = b.to(gl.int64), h.to(gl.int64)\n"
        uniform = [c for c in self._by_key if c.tensor.name in self._range_names and is_uniform(c.tensor.capture)]
        by_columns, rows = self.cut.rows == 64, row_holes(self._by_key)
        start = "start_block" if any(b.slope for b in found.side("upper")) else "0"
        needed += ["stop = tl.minimum(stop, hull_stop)"] * isinstance(self._needed, Needed)
        return {
            "full": ", partly" if self.cut.listed else "".join(f", {name}" for name in self._full),
            "full_meaning": "# Also between which rows all of these keys are needed." if self._full else "",
            "row_range": as_gluon("\n".join(needed)),
            "start_block": f"gl.maximum({start}, hull_start)" if isinstance(self._needed, Needed) else start,
            "range_captures": wide * bool(uniform or rows["row_lanes"]) + as_gluon("\n".join(c.base for c in uniform)),
            "capture_bases": as_gluon("\n".join(c.base for c in self._by_key if not c.in_loop)),
            **rows,
            "dq_columns": "WIDTH // 2" if by_columns else "WIDTH",
            "part_lines": str(padded(self.head_dim) * (1 if by_columns else 2)),
            "turned": "turned" if by_columns else "turned.slice(MEMBER * 64, 64, 1)",
            "k_part": "keys.slice(MEMBER * (WIDTH // 2), WIDTH // 2, 1)" if by_columns else "keys",
            "clamped_keys": self._clamped_keys,
            **self._wide,
            "width": str(padded(self.head_dim)),
            "rows_at_a_time": str(self.cut.rows),
            "described_rows": "64, 128" if by_columns else "128,",
            "element": _ELEMENT[self.dtype],
            "finish_mask": _inside("rows < Sq", "d", self.head_dim),
        }

    @property
    def _clamped_keys(self) -> str:
        """The keys: none beyond the end where captured tensors are read by them, or derivatives might not be finite."""
        if self._folds.slope[0] is None and not any("j" in capture.dims for capture in self.spec.captures):
            return "j = columns"
        return "# Nothing beyond the last key is read.\nj = gl.minimum(columns, Sk - 1)"

    @property
    def _wide(self) -> dict[str, str]:
        """64-bit heads, where addresses of captured tensors are counted from them."""
        bases = "\n".join(c.base for c in self._by_key)
        wide = ", ".join(name for name in ("b", "g") if f"{name}_wide" in bases)
        return {
            "wide_heads": "b_wide, g_wide = b.to(gl.int64), g.to(gl.int64)" if wide else "",
            "wide_head": "h_wide = h.to(gl.int64)" if "h_wide" in bases else "",
        }

    @property
    def _launch(self) -> dict[str, str]:
        """The holes of the host side."""
        cut, width = self.cut, padded(self.head_dim)
        statistics = [launch_holes(self)["statistics"]] if launch_holes(self)["statistics"] else []
        blocks = f"-(-rows // {cut.rows}) * {cut.rows}"
        statistics.append(
            f"sums = torch.empty((batch, heads, {blocks}, {width}), dtype=torch.float32, device=q.device)"
        )
        return {"statistics": "\n".join(statistics), "launches": "\n".join((prepare_text(self), self._launches))}

    @property
    def _launches(self) -> str:
        cut, width, captures = self.cut, padded(self.head_dim), self._folds.captures
        described = [f"described({x}, {rows})" for x, rows in
                     (("q", cut.rows), ("k", cut.keys), ("v", cut.keys), ("dout", cut.rows))]  # fmt: skip
        described += [f"vectors({name})" for name in (*self._statistics, "delta")]
        values = (v for c in captures for v in (*c.stride_values, *(f"{c.name}.shape[0]" for _ in c.period)))
        constants = (f"GROUP={'heads // kv_heads'}", f"BLOCK_M={cut.rows}", f"KEYS={cut.keys}", f"WIDTH={width}")
        limits, names = ((self._needed.argument,), self._needed.constants) if self._needed else ((), ())
        switches = (f"STAGES={cut.stages}", f"WHOLE=keys % {cut.keys} == 0", *(f"{name}=hulled" for name in names))
        described += [f"described(dk, {cut.keys})", f"described(dv, {cut.keys})", "parts(sums)"]
        arguments = (*described, *(c.name for c in captures), *limits, *values)
        sizes = ("heads", "kv_heads", "rows", "keys", *_SIZES[4:])
        holes = {
            "keys": str(cut.keys),
            "width": str(width),
            "group": self._group(width),
            "gradient_arguments": listing((*arguments, *sizes, *constants, *switches, "num_warps=4")),
        }
        return fill(finish.LAUNCHES, {**holes, **needed_holes(self._needed), **self._finish}).rstrip("\n")

    @property
    def _finish(self) -> dict[str, str]:
        """The holes of the kernel after the products."""
        dq = ("dq_stride_b", "dq_stride_h", "dq_stride_i")
        dv = ("dv_stride_b", "dv_stride_h", "dv_stride_j") * self.spoils
        given = ["sums", "dq", *(f"dq.stride({axis})" for axis in range(3))]
        given += ["dv", "spoilt", *(f"dv.stride({axis})" for axis in range(3)), "kv_heads"] * self.spoils
        names = ["sums_ptr", "dq_ptr", *dq, *("dv_ptr", "spoilt_ptr") * self.spoils, *dv, *("kv_heads",) * self.spoils]
        kv_head = {
            "prepared_rows": str(self.cut.rows),
            "kv_head": KV_HEAD[self.spec.kv_map],
            "dv_mask": _inside("columns < Sk", "d", self.value_dim),
        }
        width = padded(self.head_dim)
        return {
            "finish_parameters": listing((*names, "heads", "Sq", "Sk", "blocks", "WIDTH"), annotate=True),
            "finish_arguments": listing((*given, "heads", "rows", "keys", "blocks", f"WIDTH={width}", "num_warps=4")),
            "spoil_dv": fill(finish.SPOIL_DV, kv_head).rstrip("\n") if self.spoils else "",
        }

    def _group(self, width: int) -> str:
        """The pairs of batch and key/value head that are worked on together, where the first keys take longest."""
        if not any(b.slope for b in self._folds.range.side("upper")):
            return "1"
        return f"min(pairs, max(1, {_L2} // ({8 * width} * rows * (heads // kv_heads))))"

    @property
    def _read(self) -> frozenset[str]:
        """The symbols that score, slope and mask read."""
        expressions = [e for e in (self.spec.score, self.spec.mask, self._folds.slope[0]) if e is not None]
        return frozenset(str(leaf.value) for e in expressions for leaf in e.walk() if leaf.op == "symbol")

    def _emit(self, expr: Expr) -> str:
        return as_gluon(emit(*(named(expr, self.spec) if self._apart else (expr, {}, self.spec.capture_kinds))))


def is_light(spec: AttentionSpec, dtype: torch.dtype) -> bool:
    """Whether registers are left beside the gradients of keys and values: weights and slopes are simple."""
    captured = any("i" in capture.dims for capture in spec.captures)
    return not captured and plan.slope(spec)[0] is None and not plan.weights(spec, dtype).recounted


def hopper_text(
    spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, cut: Config, wanted: tuple[bool, ...]
) -> str:
    """The source of the module."""
    # The kernel that computes delta has the same blocks of rows; those that it counts again go by 64 keys.
    blocks = BackwardConfig(PortableConfig(cut.rows, cut.keys, 4, 1), PortableConfig(cut.rows, 64, 4, 1))
    return str(HopperText(spec, head_dim, value_dim, dtype, blocks, wanted, cut))


def _each(text: str, names: tuple[str, ...]) -> str:
    return "".join(fill(text, {"vector": name}) for name in names).rstrip("\n")


def _inside(first: str, index: str, width: int) -> str:
    return f"({first}) & ({index} < {width})"
