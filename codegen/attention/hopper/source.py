"""From an attention specification to the source of its Hopper kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

import torch

from fxopt.codegen.attention.frame import HEADER, KV_HEAD, MAIN, REFERENCE, allocation, description, unpacked
from fxopt.codegen.attention.gluon import as_gluon, named_apart, parameters
from fxopt.codegen.attention.hopper import order
from fxopt.codegen.attention.hopper.average import KERNEL as AVERAGE
from fxopt.codegen.attention.hopper.average import LAUNCH as LAUNCH_AVERAGE
from fxopt.codegen.attention.hopper.average import ROWS as AVERAGE_ROWS
from fxopt.codegen.attention.hopper.config import Config
from fxopt.codegen.attention.hopper.needed import NeededKeys
from fxopt.codegen.attention.hopper.template import (
    ATTEND,
    AWAIT,
    CONSUMER,
    DESCRIBED,
    GROUP,
    IMPORTS,
    KERNEL,
    LAUNCH,
    LOOP,
    PAIRED,
    PLACE,
    PRODUCER,
    RANGE,
    TILE,
)
from fxopt.codegen.attention.interval import is_uniform
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.loops import key_range_text
from fxopt.codegen.attention.script import script_holes
from fxopt.codegen.printing import helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec

_ELEMENT: Final = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
#: By what a row without keys gives; its mean of the values is filled in afterwards.
_INVERSE: Final = {"nan": "1.0 / total", "zero": "gl.where(total == 0, 0.0, 1.0 / total)", "uniform": "1.0 / total"}
#: Keys and values of heads that are worked on together stay in this much of the L2 cache, in bytes.
_L2: Final = "32 * 2**20"
SIZES: Final = ("Sq", "Sk", "heads", "kv_heads", "blocks", "halves", "group", "pairs")
_BARRIERS: Final = ("q_ready", "q_free", "k_ready", "v_ready", "free")
TILES: Final = ("q_tiles", "k_tiles", "v_tiles")
_STATE: Final = ("acc", "p", "pair", "q", "k_tiles", "v_tiles", "k_ready", "v_ready", "free")
CONSTANTS: Final = ("ROWS", "BLOCK_N", "WIDTH", "STAGES", "QUERIES", "GROUPS")


@dataclass(frozen=True)
class HopperText(NeededKeys):
    """The source for one specification, pair of head dimensions, input dtype and configuration."""

    spec: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    config: Config
    further_bounds: ClassVar[bool] = True
    _loop_text: ClassVar[str] = LOOP
    _multiplied: ClassVar[tuple[str, ...]] = TILES

    def __str__(self) -> str:
        holes = {**self._description, **self._lists, **self._attend, **self._consumer, **self._launch}
        places = (PLACE,) if self._order is None else (order.PLACE, order.CLEAR)
        parts = (*places, *((AWAIT,) if self._hull else ()), *self._parts)
        body = "".join(fill(part, holes) for part in parts)
        functions = self._functions
        called = (*helpers(functions), *(named_apart(as_gluon(text)) for text in helpers(body)))
        devices = "".join(f"\n{text}\n" for text in called)
        average = fill(AVERAGE, holes) if self._averages else ""
        script = {**holes, **script_holes(self.spec, self.dtype)}
        check = fill(REFERENCE, script) + fill(MAIN, script)
        return (
            fill(HEADER, holes)
            + devices
            + functions
            + average
            + named_apart(body)
            + fill(DESCRIBED, holes)
            + fill(LAUNCH, holes)
            + check
        )

    @property
    def _parts(self) -> tuple[str, ...]:
        """The text of the kernel and its functions."""
        return (RANGE, PRODUCER, ATTEND, CONSUMER, KERNEL)

    @property
    def _barriers(self) -> tuple[str, ...]:
        """What loading and multiplying groups signal by, and what is shared beside queries, keys and values."""
        return _BARRIERS

    @property
    def _state(self) -> tuple[str, ...]:
        """What one block of keys hands to the next, and what it reads."""
        return _STATE

    @property
    def _constants(self) -> tuple[str, ...]:
        """The compile-time constants of the kernel."""
        return CONSTANTS

    @property
    def _block_constants(self) -> tuple[str, ...]:
        """Those of a block of keys."""
        return ("BLOCK_N", "WIDTH", "STAGES", "SCORES", "WEIGHTS")

    @property
    def _scores(self) -> tuple[str, ...]:
        """What a block update is given for each row and key."""
        return ("s",)

    @property
    def _averages(self) -> bool:
        """Whether a row without keys gives the mean of the values."""
        return self.spec.empty_rows == "uniform"

    @cached_property
    def _range_names(self) -> tuple[str, ...]:
        """What the range of keys of a tile depends on."""
        bounds = [single for bound in self.range.bounds for single in bound.all]
        read = {str(leaf) for bound in bounds for leaf in bound.offset.walk() if not leaf.args}
        captured = (c.name for c in self.captures if c.name in read)
        symbols = (name for name in ("b", "h", "Sq") if name in read)
        return ("first", "last", *symbols, "Sk", *captured, *self._hull_names)

    @property
    def _description(self) -> dict[str, str]:
        spec = self.spec
        lower = bool(self.range.side("lower"))
        begin = "hull_start" if self._hull else "0"
        config = f"{self.config} (rows x keys, stages, tiles of queries)"
        return {
            **description(spec, self.head_dim, self.value_dim, config, self.captures),
            "library": "",
            "imports": IMPORTS.rstrip("\n"),
            **self._places,
            "range_parameters": listing((*self._range_names, "BLOCK_N"), annotate=True).replace("tl.", "gl."),
            "key_range": as_gluon(self._key_range),
            "start_block": "start_block" if lower else begin,
            "full_start": "full_start" if lower or self._sure else begin,
        }

    @property
    def _places(self) -> dict[str, str]:
        """The holes of the order of tiles: without halves where all rows need as many keys."""
        if self._order is not None:
            return self._order.holes
        calls = {"places": "blocks, halves, group, pairs", "turns": "turns_of(blocks, halves, pairs)", "clear": ""}
        plain = {"order_rows": "", "turned": "turn", "spans": "blocks", "halved": "", "pair": "before + within % size"}
        if not self._ranged:
            return {**PAIRED, **calls, **plain}
        order = "row = gl.where(turn % halves == 0, blocks - 1 - row, row)"
        halved = {"turned": "turn // halves", "spans": "blocks // halves", "halved": " * halves"}
        return {**PAIRED, **calls, **plain, **halved, "order_rows": order}

    @property
    def _group(self) -> str:
        """How many pairs of batch entry and head go together, as the launcher computes it: those of rows alike."""
        return self._fitting if self._ranged or self.config.listed else "1"

    @property
    def _fitting(self) -> str:
        """As many as have keys and values that fit the cache."""
        return f"min(pairs, max(1, {_L2} // ({4 * padded(self.head_dim)} * keys)))"

    @property
    def _key_range(self) -> str:
        text = key_range_text(self.range, self.emit, self._hull is not None)
        lines = [line for line in text.splitlines() if not line.startswith("tail_start")]
        if self._sure:
            begin = "full_start" if self.range.side("lower") else "hull_start"
            lines += ["full_stop = tl.minimum(full_stop, sure_stop)", f"full_start = tl.maximum({begin}, sure_start)"]
        return "\n".join(lines)

    @property
    def _pointers(self) -> tuple[str, ...]:
        """The captured tensors as the kernel takes them: addresses, strides, periods."""
        found = [c.parameter for c in self.captures] + ["hull_ptr"] * bool(self._hull)
        found += ["hull_lists_ptr"] * (self._hull_lists is not None) + ["key_lists_ptr"] * self.config.listed
        found += [name for c in self.captures for name in (*c.strides, *c.period)]
        return tuple(found)

    @property
    def _lists(self) -> dict[str, str]:
        """Parameters and arguments of the functions."""
        sources = ("q_source", "k_source", "v_source")
        hull = ("HULL",) if self._hull else ()
        load = (*sources, *TILES, *self._barriers, *self._pointers, *SIZES, *self._constants, *hull)
        multiply = ("out_target", "lse_ptr", *self._multiplied, *self._barriers, *self._pointers, *SIZES)
        options = ("REGISTERS", *hull, "WITH_LSE")
        kernel = (*sources, "out_target", "lse_ptr", *self._pointers, *SIZES, *self._constants, *options)
        ranged = (*self._range_names, "BLOCK_N")
        group = (*multiply, *self._constants, *hull, "WITH_LSE")
        numbers = map(str, range(self.config.groups))
        members = (fill(GROUP, {"arguments": listing((n, *group))}).rstrip("\n") for n in numbers)
        unspecialized = (*SIZES, *(p for c in self.captures for p in c.period))
        return {
            "load_parameters": parameters(load),
            "load_arguments": listing(load),
            "multiply_parameters": parameters(("MEMBER", *group)),
            "kernel_parameters": parameters(kernel),
            "range_arguments": listing(ranged),
            "groups": "\n".join(members),
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in unspecialized) + "]",
        }

    @property
    def _attend_names(self) -> tuple[str, ...]:
        captures = (name for c in self.captures for name in c.attend_names)
        symbols = (name for name in ("b", "h", "i", "Sq") if name in self._indices)
        return ("total", "peak", *captures, *symbols, "Sk")

    @property
    def _indices(self) -> frozenset[str]:
        """The symbols that a block update reads."""
        return self.symbols_read

    @property
    def _attend(self) -> dict[str, str]:
        """The holes of the block update."""
        shared = (*self._attend_names, "start")
        constants = (*self._block_constants, "BOUNDED")
        attend = (*self._scores, *shared, "BLOCK_N", "BOUNDED", "SCORES")
        logits = {name: as_gluon(text) for name, text in self.logits_holes.items()}
        logits["load_captures"] = logits["load_captures"].replace("BOUNDED and not EVEN", "BOUNDED")
        return {
            **logits,
            "attend_parameters": parameters(attend),
            "attend_arguments": listing(attend),
            "advance_parameters": parameters((*self._state, *shared, *constants)),
            "first_arguments": self._first_arguments,
        }

    @property
    def _first_arguments(self) -> str:
        """The arguments with which the first block of a tile is worked on."""
        return listing((*self._scores, *self._attend_names, "block * BLOCK_N", "BLOCK_N", "True", "SCORES"))

    @property
    def _partial_after_first(self) -> bool:
        """Whether blocks before the last one may be cut by a bound from above."""
        return bool(self.range.side("upper")) or self._sure

    @property
    def _partial_at_start(self) -> bool:
        """Whether the first blocks may be cut by a bound from below."""
        return bool(self.range.side("lower")) or self._sure

    @property
    def _consumer(self) -> dict[str, str]:
        """The holes of the multiplying groups."""
        factor = self.exponent.factor
        spans = [("gl.maximum(full_stop, start)", True)] * self._partial_after_first
        spans += [("gl.maximum(full_start, start)", False)]
        spans += [("start", True)] * self._partial_at_start
        uniform = [c for c in self.captures if c.name in self._range_names and is_uniform(c.capture)]
        wide = "b_wide, h_wide = b.to(gl.int64), h.to(gl.int64)\n" if uniform else ""
        place = {
            **self._places,
            "hull_limits": as_gluon(self._hull_limits),
            "capture_bases": as_gluon("\n".join(c.base for c in self.given if c.base)),
            "range_arguments": self._lists["range_arguments"],
        }
        return {
            "kv_head": KV_HEAD[self.spec.kv_map],
            "range_captures": wide + as_gluon("\n".join((*(c.base for c in uniform), self._hull_limits)).strip("\n")),
            "tile": fill(TILE, place).rstrip("\n"),
            "loops": "\n".join(self._loop(last, bounded) for last, bounded in spans),
            "await_hulls": "if HULL:\n    await_hulls()" if self._hull else "",
            "inverse": _INVERSE[self.spec.empty_rows],
            "lse_factor": f" * {factor!r}" if factor != 1.0 else "",
        }

    def _loop(self, last: str, bounded: bool) -> str:
        return fill(self._loop_text, {"last": last, "arguments": self._advancing(str(bounded))}).rstrip("\n")

    def _advancing(self, *switches: str) -> str:
        """The arguments with which a block is worked on."""
        names = (*self._state, *self._attend_names, "block * BLOCK_N", *self._block_constants)
        return listing((*names, *switches))

    @property
    def _launch(self) -> dict[str, str]:
        """The holes of the host side."""
        names = [c.name for c in self.captures]
        config, width = self.config, padded(self.head_dim)
        values = [v for c in self.captures for v in (*c.stride_values, *(f"{c.name}.shape[0]" for _ in c.period))]
        tensors = ("described(q, 64)", f"described(k, {config.keys})", f"described(v, {config.keys})")
        sizes = ("rows", "keys", "heads", "kv_heads", "blocks", "halves", "group", "pairs")
        switches = [f"{name}={value}" for name, value in self._constant_values.items()]
        hull, hulled = (("hull",), ("HULL=hulled",)) if self._hull else ((), ())
        lists = (*(("hull_lists",) if self._hull_lists else ()), *(("key_lists",) if self._key_lists else ()))
        captured = (*(c.argument for c in self.captures), *hull, *lists, *values)
        options = (*switches, *hulled, "WITH_LSE=True" if self._averages else "WITH_LSE=with_lse")
        arguments = (*tensors, "described(out, 64)", "lse", *captured, *sizes, *options)
        return {
            "allocate": allocation(self.spec, self.value_dim),
            "unpack_captures": unpacked(names),
            "width": str(width),
            "element": _ELEMENT[self.dtype],
            "described_rows": "64, 128" if config.keys > 64 else "64,",
            "rows": str(config.rows),
            "halves": "2 if blocks % 2 == 0 else 1" if self._ranged else "1",
            "group": self._group,
            **self._small_kernels,
            "lse_shape": "(batch, heads, rows)" + ("" if self._averages else " if with_lse else (0,)"),
            "lse": "lse if with_lse else torch.empty(0, dtype=lse.dtype, device=q.device)" if self._averages else "lse",
            "launch_average": self._launch_average,
            "allocate_phases": "",
            "launch_phases": "",
            "tiled": "",
            "launch_arguments": listing((*arguments, "num_warps=4", *(("launch_pdl=hulled",) if self._hull else ()))),
        }

    @property
    def _launch_average(self) -> str:
        holes = {"average_rows": str(AVERAGE_ROWS), "width": str(padded(self.value_dim))}
        return fill(LAUNCH_AVERAGE, holes).rstrip("\n") if self._averages else ""

    @property
    def _constant_values(self) -> dict[str, object]:
        config, width = self.config, padded(self.head_dim)
        cut = (config.rows, config.keys, width, config.stages, config.queries, config.groups)
        return {**dict(zip(CONSTANTS, cut, strict=True)), "REGISTERS": config.registers}
