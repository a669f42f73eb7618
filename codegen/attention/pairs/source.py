"""From an attention specification to the source of a Hopper kernel that takes whole (batch, head) pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.frame import HEADER, KV_HEAD, MAIN, REFERENCE, allocation, description, unpacked
from fxopt.codegen.attention.gluon import as_gluon, parameters
from fxopt.codegen.attention.hopper.template import DESCRIBED, GROUP, IMPORTS
from fxopt.codegen.attention.hopper.tile import WIDENED, is_tile
from fxopt.codegen.attention.logits import LogitsText
from fxopt.codegen.attention.pairs import template, tile
from fxopt.codegen.attention.pairs.config import Config
from fxopt.codegen.attention.pairs.tile import PairTile, tile_of, tile_stages
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.script import script_holes
from fxopt.codegen.printing import helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import conjuncts

_LEGEND: Final = "(rows x keys in pieces, groups, stages, blocks of queries)"
_ELEMENT: Final = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
#: By what a row without keys gives.
_INVERSE: Final = {"nan": "1.0 / total", "zero": "gl.where(total == 0, 0.0, 1.0 / total)", "uniform": "1.0 / total"}
_SOURCES: Final = ("q_source", "k_source", "v_source")
_TILES: Final = ("q_tiles", "k_tiles", "v_tiles")
_BARRIERS: Final = ("q_ready", "q_free", "k_ready", "v_ready", "free")
_SIZES: Final = ("heads", "kv_heads", "spans", "pairs", "Sq", "Sk", "copies")
_LOADED: Final = ("BLOCKS", "PARTS", "PART", "STAGES", "QUERIES")
_MULTIPLIED: Final = ("BLOCKS", "PARTS", "STAGES", "QUERIES", "GROUPS", "WIDTH", "FULL", "WITH_LSE")
_PARTS: Final = (template.PLACE, template.PRODUCER, template.ATTEND, template.CONSUMER, template.KERNEL)


@dataclass(frozen=True)
class PairsText(LogitsText):
    """The source for one specification, pair of head dimensions, input dtype and configuration."""

    spec: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    config: Config

    def __str__(self) -> str:
        holes = {**self._description, **self._loading, **self._logits, **self._multiplying, **self._launch}
        body = "".join(fill(part, holes) for part in _PARTS)
        devices = "".join(f"\n{as_gluon(text)}\n" for text in helpers(body))
        devices += WIDENED[self.dtype] if self._tile else ""
        keys = self.config.keys
        script = script_holes(self.spec, self.dtype, check=keys * 3 // 4 + 1, timed=(2**17 // keys, keys))
        holes |= script
        host = fill(DESCRIBED, holes) + fill(template.LAUNCH, holes)
        return fill(HEADER, holes) + devices + body + host + fill(REFERENCE, holes) + fill(MAIN, holes)

    @cached_property
    def captures(self) -> tuple[CapturedTensor, ...]:
        """The captured tensors, one that varies with row and key by descriptors."""
        return tuple((PairTile if is_tile(c) else CapturedTensor)(n, c) for n, c in enumerate(self.spec.captures))

    @cached_property
    def _tile(self) -> PairTile | None:
        return tile_of(self.captures)

    @property
    def _pointers(self) -> tuple[str, ...]:
        """The captured tensors as kernel and groups take them: addresses, strides, periods."""
        plain = [c for c in self.captures if c is not self._tile]
        return (*(c.parameter for c in plain), *(name for c in plain for name in (*c.strides, *c.period)))

    @property
    def _tile_sources(self) -> tuple[str, ...]:
        return self._tile.sources(self.config) if self._tile else ()

    @property
    def _tile_shared(self) -> tuple[str, ...]:
        return self._tile.shared(self.config) if self._tile else ()

    @property
    def _tile_constants(self) -> tuple[str, ...]:
        return ("TILE_STAGES",) if self._tile else ()

    @property
    def _description(self) -> dict[str, str]:
        config = f"{self.config} {_LEGEND}"
        found = description(self.spec, self.head_dim, self.value_dim, config, self.captures)
        return {**found, "library": "", "imports": IMPORTS.rstrip("\n")}

    @property
    def _loading(self) -> dict[str, str]:
        """The holes of the group that loads, and of the kernel around it."""
        shared = (*_TILES, *_BARRIERS, *self._tile_shared)
        load = (*_SOURCES, *self._tile_sources, *shared, *_SIZES, *_LOADED, *self._tile_constants)
        constants = (*_MULTIPLIED, "PART", *self._tile_constants, "REGISTERS")
        kernel = (*_SOURCES, *self._tile_sources, "out_target", "lse_ptr", *self._pointers, *_SIZES, *constants)
        unspecialized = (*_SIZES, *(p for c in self.captures for p in c.period))
        return {
            "kv_head": KV_HEAD[self.spec.kv_map],
            "load_parameters": parameters(load),
            "load_arguments": listing(load),
            "kernel_parameters": parameters(kernel),
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in unspecialized) + "]",
            "produce_tile": self._tile.produce(self.config) if self._tile else "",
            "allocate_tile": self._tile.allocate(self.config) if self._tile else "",
        }

    @property
    def _masks(self) -> str:
        """The lines that set the logits beyond the last key and outside the mask; a piece has all terms or none."""
        kept = " & ".join(("(j < Sk)", *(f"({self.emit(term)})" for term in conjuncts(self.spec.mask))))
        return f'if BOUNDED:\n    x = gl.where({kept}, x, float("-inf"))'

    @property
    def _logits_names(self) -> tuple[str, ...]:
        """What the logits of a piece are given beside its products and place."""
        return (*self._pointers, "b", "h", "first", "Sq", "Sk")

    @property
    def _logits(self) -> dict[str, str]:
        """The holes of the logits of a piece and of their weights."""
        holes = {name: as_gluon(text) for name, text in self.logits_holes.items()}
        holes["load_captures"] = holes["load_captures"].replace("BOUNDED and not EVEN", "BOUNDED")
        given = ("s", *((self._tile.name,) if self._tile else ()), *self._logits_names)
        return {
            **holes,
            "logits_parameters": parameters((*given, "start", "COUNT", "BOUNDED", "SCORES")),
            "capture_bases": as_gluon("\n".join(c.base for c in self.captures if c.base)),
            "average": template.AVERAGE if self.spec.empty_rows == "uniform" else "",
        }

    @property
    def _multiplying(self) -> dict[str, str]:
        """The holes of the groups that multiply."""
        shared = (*_TILES, "out_tiles", *_BARRIERS, *self._tile_shared)
        group = ("out_target", "lse_ptr", *shared, *self._pointers, *_SIZES, *_MULTIPLIED, *self._tile_constants)
        members = (fill(GROUP, {"arguments": listing((str(n), *group))}) for n in range(self.config.groups))
        factor = self.exponent.factor
        return {
            "multiply_parameters": parameters(("MEMBER", *group)),
            "groups": "".join(members).rstrip("\n"),
            "layouts": self._each(_layout),
            "products": self._each(_products),
            "packed": ", ".join(f"w_{n}" for n in range(len(self.config.pieces))),
            "await_tile": self._tile.await_values if self._tile else "",
            "release_tile": self._tile.release if self._tile else "",
            "logits": self._each(self._logits_of),
            "weights": self._each(_weights),
            "inverse": _INVERSE[self.spec.empty_rows],
            "lse_factor": f" * {factor!r}" if factor != 1.0 else "",
        }

    def _each(self, text: Callable[[int, int, int], str]) -> str:
        """``text(n, start, keys)`` of every piece."""
        config = self.config
        return "\n".join(text(n, *place) for n, place in enumerate(zip(config.starts, config.pieces, strict=True)))

    def _logits_of(self, n: int, start: int, keys: int) -> str:
        """The logits of a piece, beside the products of those after it, and the largest of each row in eight parts."""
        values = (self._tile.values(n, keys),) if self._tile else ()
        bounded = f"FULL <= {n}" if self.spec.mask is None else "True"
        arguments = (f"s_{n}", *values, *self._logits_names, str(start), str(keys), bounded, f"SCORES_{n}")
        # Given the peaks so far, the wait stays behind them.
        waited = f"s_{n}, peaks" if n else f"s_{n}"
        wait = f"{waited} = warpgroup_mma_wait({len(self.config.pieces) - 1 - n}, deps=[{waited}])"
        return "\n".join((wait, f"x_{n} = logits(\n    {', '.join(arguments)}\n)", _peaks(n, keys)))

    @property
    def _launch(self) -> dict[str, str]:
        """The holes of the host side."""
        config, width = self.config, padded(self.head_dim)
        ends = tuple(start + keys for start, keys in zip(config.starts, config.pieces, strict=True))
        return {
            "allocate": allocation(self.spec, self.value_dim),
            "unpack_captures": unpacked([c.name for c in self.captures]),
            "longest": str(config.keys),
            "width": str(width),
            "element": _ELEMENT[self.dtype],
            "described_rows": ", ".join(map(str, sorted({64, config.part}))) + ",",
            "tiled": self._tiled,
            "align_tile": f"{self._tile.name} = aligned({self._tile.name})" if self._tile else "",
            "rows": str(config.rows),
            "blocks": str(config.blocks),
            "full": f"sum(keys >= end for end in {ends})",
            "launch_arguments": listing(self._arguments),
        }

    @property
    def _tiled(self) -> str:
        keys = ", ".join(map(str, sorted(set(self.config.pieces)))) + ","
        holes = {"tile_keys": keys, "element": _ELEMENT[self.dtype]}
        return fill(tile.DESCRIBED, holes) if self._tile else ""

    @property
    def _arguments(self) -> tuple[str, ...]:
        config, plain = self.config, [c for c in self.captures if c is not self._tile]
        tensors = ("described(q, 64)", f"described(k, {config.part})", f"described(v, {config.part})")
        tiles = self._tile.arguments(config) if self._tile else ()
        values = [v for c in plain for v in (*c.stride_values, *(f"{c.name}.shape[0]" for _ in c.period))]
        sizes = ("heads", "kv_heads", "spans", "pairs", "rows", "keys", str(config.keys // config.part))
        switches = (f"{name}={value}" for name, value in self._constants.items())
        options = ("FULL=full", "WITH_LSE=with_lse", "num_warps=4")
        results = ("described(out, 64)", "lse")
        return (*tensors, *tiles, *results, *(c.argument for c in plain), *values, *sizes, *switches, *options)

    @property
    def _constants(self) -> dict[str, int]:
        config, width = self.config, padded(self.head_dim)
        found = {
            "BLOCKS": config.blocks,
            "PARTS": config.keys // config.part,
            "PART": config.part,
            "STAGES": config.stages,
            "QUERIES": config.queries,
            "GROUPS": config.groups,
            "WIDTH": width,
            "REGISTERS": config.registers,
        }
        return found | ({"TILE_STAGES": tile_stages(config, width)} if self._tile else {})


def _layout(n: int, start: int, keys: int) -> str:
    return f"SCORES_{n}: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {keys}, 16])"


def _products(n: int, start: int, keys: int) -> str:
    return f"s_{n} = products(q, k_tiles, slot, {start}, {keys}, PARTS, SCORES_{n})"


def _peaks(n: int, keys: int) -> str:
    largest = f"gl.max(by_thread(x_{n}, {keys}), 1)"
    return f"peaks = gl.maximum(peaks, gl.convert_layout({largest}, peaks.type.layout))" if n else f"peaks = {largest}"


#: Before the first products of weights and values. As late as here, the registers of the result hold nothing before.
_BEGIN: Final = """\
mbarrier.wait(v_ready.index(slot), (turn // STAGES) & 1)
acc = gl.zeros([64, WIDTH], gl.float32, layout=RESULT)"""


def _weights(n: int, start: int, keys: int) -> str:
    """The weights of a piece, the sum of each row's in eight parts, and the products of its values on their way."""
    total = f"gl.sum(by_thread(p_{n}, {keys}), 1)"
    weigh = f"p_{n} = weigh(x_{n}, peak, {start}, Sk, {keys}, SCORES_{n})"
    add = f"parts += gl.convert_layout({total}, parts.type.layout)" if n else f"parts = {total}"
    packed = f"w_{n} = gl.convert_layout(p_{n}.to(v_tiles.dtype), WEIGHTS)"
    onto = "acc, is_async=True" if n else "acc, use_acc=False, is_async=True"
    product = f"acc = warpgroup_mma(w_{n}, piece(v_tiles, slot, {start}, {keys}, PARTS, WIDTH), {onto})"
    return "\n".join((weigh, add, packed, *(() if n else (_BEGIN,)), product))
