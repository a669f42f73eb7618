"""From an attention specification to the source of its forward kernel."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.dropout import Dropout
from fxopt.codegen.attention.frame import (
    AXIS,
    HEADER,
    KV_HEAD,
    MAIN,
    REFERENCE,
    STRIDES,
    allocation,
    both,
    description,
    unpacked,
)
from fxopt.codegen.attention.interval import KeyRange, key_range
from fxopt.codegen.attention.logits import LogitsText
from fxopt.codegen.attention.portable import phases
from fxopt.codegen.attention.portable.config import Config, padded
from fxopt.codegen.attention.portable.hull import Hull
from fxopt.codegen.attention.portable.key_lists import LISTS, KeyLists
from fxopt.codegen.attention.portable.loops import Span, key_range_text, loop_spans
from fxopt.codegen.attention.portable.template import ATTEND, AVERAGE, KERNEL, LAST, LAUNCH, LOOP, UPDATE, USE_AVERAGE
from fxopt.codegen.attention.portable.tiles import DESCRIBABLE, IMPORT, Tiles, wide
from fxopt.codegen.attention.possible import possible_keys
from fxopt.codegen.attention.script import script_holes
from fxopt.codegen.attention.softmax import row_maximum
from fxopt.codegen.printing import helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec

#: By what a row without keys gives; ``{0}`` is the softmax of the others times the values.
_RESULT: Final = {"nan": "{0}", "zero": "tl.where(total[:, None] == 0, 0.0, {0})", "uniform": "{0}"}
#: Constants of a block update, besides the sizes written into it.
_CONSTANTS: Final = ("BLOCK_N", "PRECISION", "FAST_TANH", "EVEN")


@dataclass(frozen=True)
class KernelText(LogitsText):
    """The source for one specification, pair of head dimensions, input dtype and configuration."""

    spec: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    config: Config
    further_bounds: ClassVar[bool] = True

    def __str__(self) -> str:
        holes = {**self._description, **self._attend, **self._kernel, **self._launch}
        describable = DESCRIBABLE if self._tiles.described else ""
        average = fill(AVERAGE, holes) if self._averages else ""
        hull = "" if self._hull is None else self._hull.kernel
        lists = "" if self._lists is None else self._lists.kernel + LISTS
        copies = phases.PHASES if self._bands else ""
        kernels = (self._dropout.function, fill(ATTEND, holes), average, hull, lists, copies, fill(KERNEL, holes))
        texts = (*kernels, describable, fill(LAUNCH, holes))
        body = "".join(texts)
        devices = "".join(f"\n{text}\n" for text in helpers(body))
        script = {**holes, **script_holes(self.spec, self.dtype)}
        check = script["philox"] + fill(REFERENCE, script) + fill(MAIN, script)
        return fill(HEADER, holes) + devices + body + check

    @property
    def _dropout(self) -> Dropout:
        return Dropout(self.spec)

    @cached_property
    def captures(self) -> tuple[CapturedTensor, ...]:
        """The captured tensors, bands by their phases."""
        return phases.phased(self.spec)

    @property
    def _bands(self) -> tuple[phases.PhasedBand, ...]:
        return tuple(c for c in self.captures if isinstance(c, phases.PhasedBand))

    @cached_property
    def _lists(self) -> KeyLists | None:
        return KeyLists(self.spec, self.config.block_m, self.config.block_n) if self.config.listed else None

    @cached_property
    def range(self) -> KeyRange:
        """The bounds that limit the loops: none where lists of blocks do."""
        return KeyRange((), ()) if self._lists else key_range(self.spec, self.further_bounds)

    @cached_property
    def _hull(self) -> Hull | None:
        found = None if self._lists else possible_keys(self.spec)
        return None if found is None else Hull(self.spec, found, self.config.block_m, self.config.block_n)

    @property
    def _averages(self) -> bool:
        """Whether a row without keys gives the mean of the values."""
        return self.spec.empty_rows == "uniform"

    @cached_property
    def _tiles(self) -> Tiles:
        described = self.config.loads == "tma"
        return Tiles(described, self._inside("d[:, None]", self.head_dim), self._inside("e[None, :]", self.value_dim))

    @property
    def _description(self) -> dict[str, str]:
        imports = {"library": "", "imports": IMPORT if self._tiles.described else ""}
        return imports | description(self.spec, self.head_dim, self.value_dim, self._legend, self.captures)

    @property
    def _legend(self) -> str:
        """The configuration and what its numbers mean."""
        return f"{self.config} (rows x keys, warps, stages)"

    @property
    def _attend(self) -> dict[str, str]:
        """The holes of the block update."""
        return {
            **self.logits_holes,
            "attend_parameters": listing((*self._attend_names, *self._constants, "BOUNDED"), annotate=True),
            "load_k": self._tiles.load("k"),
            "load_v": self._tiles.load("v"),
            "block_max": self._block_max,
            "stay": self._dropout.stay(),
            "drop": self._dropout.drop("p"),
        }

    @property
    def _block_max(self) -> str:
        """The largest logit of each row."""
        if self.dtype is torch.float32 or self.config.block_m < 16 * self.config.num_warps:
            return "tl.max(x, 1)"
        return row_maximum("x", "BLOCK_N", self.config.block_n)

    @property
    def _attend_names(self) -> tuple[str, ...]:
        captures = (name for c in self.captures for name in c.attend_names)
        tiles = ("q", *self._tiles.attend_names, *captures, "start")
        symbols = (name for name in ("b", "h", "i", "Sq") if name in self.symbols_read and name not in tiles)
        return tuple(dict.fromkeys(("acc", "total", "peak", *tiles, *symbols, *self._dropout.names, "Sk")))

    @property
    def _constants(self) -> tuple[str, ...]:
        """The compile-time constants that a block update shares with the kernel."""
        return tuple(dict.fromkeys((*self._dropout.blocks, *_CONSTANTS, *self._tiles.constants)))

    @property
    def _kernel(self) -> dict[str, str]:
        """The holes of the kernel around it."""
        e_inside = self._inside("e[None, :]", self.value_dim)
        d_inside = self._inside("d[None, :]", self.head_dim)
        hull = ("HULL",) if self._hull else ()
        constants = dict.fromkeys(("BLOCK_M", *self._constants, "BLOCK_D", "BLOCK_E", "WIDE", *hull, "WITH_LSE"))
        sizes = ("heads", "kv_heads", "Sq", "Sk", *(p for c in self.captures for p in c.period))
        factor = self.exponent.factor
        return {
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in sizes) + "]",
            "kernel_parameters": listing((*self._pointers, *self._strides, *sizes, *constants), annotate=True),
            **self._order,
            "kv_head": KV_HEAD[self.spec.kv_map],
            "q_mask": f", mask={d_inside}, other=0.0" if d_inside else "",
            "tiles": self._tiles.bases,
            "capture_bases": "\n".join(c.base for c in self.captures),
            "hull_limits": "" if self._hull is None else self._hull.limits,
            **self._loops,
            **self._average,
            "load_seed": self._dropout.load,
            "result": _RESULT[self.spec.empty_rows].format(self._dropout.scaled("acc") + " / total[:, None]"),
            "out_mask": both(both("rows < Sq", e_inside), "total[:, None] != 0" if self._averages else ""),
            "lse_factor": f" * {factor!r}" if factor != 1.0 else "",
        }

    @property
    def _order(self) -> dict[str, str]:
        """The holes of the order of programs: blocks of many keys first.

        Lists may be of any length: those of one block of rows, alike in all heads, come together.
        """
        ranged = any(b.follows_rows for b in key_range(self.spec, self.further_bounds).side("upper"))
        pairs = "(tl.num_programs(0) // blocks)"
        block, pair = ("//", f"program % {pairs}") if self._lists else ("%", "program // blocks")
        turn = f"program {block} {pairs if self._lists else 'blocks'}"
        return {"row_block": f"blocks - 1 - {turn}" if ranged else turn, "pair": pair}

    @property
    def _loops(self) -> dict[str, str]:
        """The holes of the loops over blocks of keys."""
        if self._lists is not None:
            updates = {
                bounded: fill(UPDATE, {"arguments": self._arguments("start", bounded)}) for bounded in (True, False)
            }
            loops = (self._lists.loop(update.rstrip("\n"), bounded) for bounded, update in updates.items())
            return {"list_limits": self._lists.limits, "key_range": "", "loops": "\n".join(loops)}
        return {
            "list_limits": "",
            "key_range": key_range_text(self.range, self.emit, self._hull is not None),
            "loops": "\n".join(self._loop(span) for span in loop_spans(self.range, self._hull is not None)),
        }

    def _arguments(self, start: str, bounded: bool) -> str:
        """The arguments of the update with the block of keys from ``start`` on."""
        names = (start if name == "start" else name for name in self._attend_names)
        return listing((*names, *(f"{name}={name}" for name in self._constants), f"BOUNDED={bounded}"))

    @property
    def _average(self) -> dict[str, str]:
        """The holes of what a row without keys takes after the loops."""
        names = tuple(name for name in self._tiles.attend_names if name not in ("k_base", "k_tile", "k_stride_j", "d"))
        constants = dict.fromkeys(("BLOCK_N", "BLOCK_E", "EVEN", *self._tiles.constants))
        arguments = (*names, "Sk", *(f"{name}={name}" for name in constants), "BOUNDED=True")
        mask = both(both("rows < Sq", self._inside("e[None, :]", self.value_dim)), "total[:, None] == 0")
        holes = {"average_arguments": listing(arguments), "empty_mask": mask}
        use = fill(USE_AVERAGE, holes).rstrip("\n") if self._averages else ""
        parameters = listing((*names, "Sk", *constants, "BOUNDED"), annotate=True)
        return {"average_parameters": parameters, "empty_rows": use}

    def _loop(self, span: Span) -> str:
        # A block peeled off a loop of float32 products spills.
        loops = span.loops or self.dtype is torch.float32
        start = "start" if loops else span.first
        holes = {"first": span.first, "last": span.last, "arguments": self._arguments(start, span.bounded)}
        text = fill(LOOP if loops else LAST, holes).rstrip("\n")
        return f"if not EVEN:\n{textwrap.indent(text, '    ')}" if span.beyond else text

    @property
    def _pointers(self) -> tuple[str, ...]:
        further = (*self._dropout.tensors, *(("hull",) if self._hull else ()), *(("key_lists",) if self._lists else ()))
        names = ("q", "k", "v", *(c.name for c in self.captures), *further, "out", "lse")
        return tuple(f"{name}_ptr" for name in names)

    @property
    def _strides(self) -> tuple[str, ...]:
        named = tuple(f"{tensor}_stride_{axis}" for tensor, axes in STRIDES.items() for axis in axes)
        return (*named, *(name for c in self.captures for name in c.strides))

    @property
    def _stride_values(self) -> tuple[str, ...]:
        """What `_strides` names, as the launcher reads it off the tensors."""
        named = tuple(f"{tensor}.stride({AXIS[axis]})" for tensor, axes in STRIDES.items() for axis in axes)
        return (*named, *(value for c in self.captures for value in c.stride_values))

    @property
    def _launch(self) -> dict[str, str]:
        """The holes of the host side."""
        names = [c.name for c in self.captures]
        periods = [f"{c.name}.shape[0]" for c in self.captures if c.period]
        pads = (f"BLOCK_D={padded(self.head_dim)}", f"BLOCK_E={padded(self.value_dim)}")
        blocks = (f"BLOCK_M={self.config.block_m}", f"BLOCK_N={self.config.block_n}", *pads)
        even = f"EVEN=keys % {self.config.block_n} == 0"
        tma = ("TMA=tma",) if self._tiles.described else ()
        hull, hulled = (("hull",), ("HULL=hulled",)) if self._hull else ((), ())
        switches = ('PRECISION="ieee" if exact else "tf32"', "FAST_TANH=fast", even, *tma, "WIDE=wide", *hulled)
        sizes = ("heads", "kv_heads", "rows", "keys", *periods)
        given = (c.argument for c in self.captures)
        lists = ("key_lists",) if self._lists else ()
        tensors = ("q", *self._tiles.arguments, *given, *self._dropout.tensors, *hull, *lists, "out", "lse")
        arguments = (*tensors, *self._stride_values, *sizes, *blocks, *switches, "WITH_LSE=with_lse", *self._options)
        return {
            **self._dropout.launch_holes,
            "allocate": allocation(self.spec, self.value_dim),
            "unpack_captures": unpacked(names),
            "describe": self._tiles.describe(self.config.block_n, padded(self.head_dim), padded(self.value_dim)),
            "allocate_phases": phases.allocate(self._bands, self.config.block_n),
            "launch_phases": phases.launch(self._bands),
            "allocate_hull": "" if self._hull is None else self._hull.allocate,
            "launch_hull": "" if self._hull is None else self._hull.launch,
            "allocate_lists": "" if self._lists is None else self._lists.allocate,
            "launch_lists": "" if self._lists is None else self._lists.launch,
            "wide": wide(self._reaches),
            "block_m": str(self.config.block_m),
            "launch_arguments": listing(arguments),
        }

    @property
    def _options(self) -> tuple[str, ...]:
        """What the launcher tells the compiler."""
        limit = (f"maxnreg={self.config.registers}",) if self.config.registers else ()
        return (f"num_warps={self.config.num_warps}", f"num_stages={self.config.num_stages}", *limit)

    @property
    def _reaches(self) -> list[tuple[int, str]]:
        """How far each axis of a block reaches: its extent and the stride, as the launcher writes it."""
        rows, keys = self.config.block_m, self.config.block_n
        tiles = [(rows, "q.stride(2)"), (padded(self.head_dim), "q.stride(3)")]
        tiles += [(keys, "k.stride(2)"), (padded(self.head_dim), "k.stride(3)")]
        tiles += [(keys, "v.stride(2)"), (padded(self.value_dim), "v.stride(3)")]
        return tiles + [reach for c in self.captures for reach in c.reaches(rows, keys)]

    @staticmethod
    def _is_padded(width: int) -> bool:
        return width != padded(width)

    def _inside(self, index: str, width: int) -> str:
        return f"{index} < {width}" if self._is_padded(width) else ""
