"""The source of a Hopper kernel whose blocks of keys are one stream across tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.distance import apart, split_distances
from fxopt.codegen.attention.hopper import run, stream, tile
from fxopt.codegen.attention.hopper.band import BAND, PairedBand
from fxopt.codegen.attention.hopper.source import CONSTANTS, TILES, HopperText, as_gluon, parameters
from fxopt.codegen.attention.hopper.template import RANGE
from fxopt.codegen.attention.hopper.tile import StreamedTile
from fxopt.codegen.attention.portable import phases
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.loops import row_limits
from fxopt.codegen.printing import emit
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, J, Kind, S, call, capture, conjunction

_PAIR: Final = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_STREAM_BARRIERS: Final = ("ready", "free", "q_free")
_STREAM_STATE: Final = ("acc", "p", "s", "pair", "query", *TILES, "ready", "free")
#: What the result of a tile leaves with, beside itself.
_LEAVE: Final = (
    *("out_target", "lse_ptr", "out_tiles", "Sq", "heads"),
    *("ROWS", "WIDTH", "MEMBER", "WITH_LSE"),
)


@dataclass(frozen=True)
class StreamText(HopperText):
    """The same where the blocks of keys of all tiles of a program are one stream."""

    _parts: ClassVar[tuple[str, ...]] = (RANGE, stream.PRODUCER, stream.ATTEND, stream.CONSUMER, stream.KERNEL)
    _loop_text: ClassVar[str] = stream.LOOP
    _multiplied: ClassVar[tuple[str, ...]] = (*TILES, "out_tiles")
    _left: ClassVar[str] = "out_tiles.index(anew(MEMBER))"

    @property
    def _barriers(self) -> tuple[str, ...]:
        return (*_STREAM_BARRIERS, *self._tile_names)

    @property
    def _state(self) -> tuple[str, ...]:
        return (*_STREAM_STATE, *self._tile_names)

    @property
    def _constants(self) -> tuple[str, ...]:
        return (*CONSTANTS, "AHEAD", *(("TILE_STAGES",) if self._tile else ()))

    @property
    def _block_constants(self) -> tuple[str, ...]:
        streamed = ("MEMBER", "GROUPS", "TILE_STAGES") if self._tile else ()
        return ("BLOCK_N", "WIDTH", "STAGES", "AHEAD", "SCORES", "WEIGHTS", *streamed)

    @property
    def _scores(self) -> tuple[str, ...]:
        return ("s", self._tile.name) if self._tile and not self._beneath else ("s",)

    @cached_property
    def captures(self) -> tuple[CapturedTensor, ...]:
        """The captured tensors, bands by two phases and what varies with row and key by blocks in shared memory."""
        return tuple(_kind(c)(index, c) for index, c in enumerate(self.spec.captures))

    @property
    def _bands(self) -> tuple[PairedBand, ...]:
        return tuple(c for c in self.captures if isinstance(c, PairedBand))

    @cached_property
    def _tile(self) -> StreamedTile | None:
        return next((c for c in self.captures if isinstance(c, StreamedTile)), None)

    @property
    def _factor(self) -> float:
        return self._beneath[1] if self._beneath else 1.0

    @property
    def _tile_names(self) -> tuple[str, ...]:
        return self._tile.shared if self._tile else ()

    @cached_property
    def _beneath(self) -> tuple[Expr, float] | None:
        """The score of sums that begin with the captured tile, and the factor of queries."""
        return tile.beneath(self.spec, self.dtype)

    @property
    def _functions(self) -> str:
        copies = phases.PHASES + BAND if self._bands else ""
        widened = tile.WIDENED[self.dtype] if self._tile else ""
        return super()._functions + copies + widened + (tile.SCALED if self._factor != 1.0 else "")

    @property
    def _indices(self) -> frozenset[str]:
        return self.symbols_read | ({"i", "Sq"} if self._bands else frozenset())

    @property
    def _launch(self) -> dict[str, str]:
        return {
            **super()._launch,
            "allocate_phases": phases.allocate(self._bands, self.config.keys),
            "launch_phases": phases.launch(self._bands),
            **self._streaming,
        }

    @property
    def _streaming(self) -> dict[str, str]:
        """The holes of a captured tensor that is brought with the keys."""
        if self._tile is None:
            return dict.fromkeys(tile.HOLES, "") | {"beneath": tile.ZERO, "sums": "zero, use_acc=False"}
        sums = self._tile.name if self._beneath else "zero, use_acc=False"
        read, release = (text.format(self._tile.name) for text in (tile.READ, tile.RELEASE))
        described = {"keys": str(self.config.keys), "swizzle": str(tile.swizzle(self.config))}
        return {
            "produce_tile": self._tile.produce,
            "allocate_tile": tile.ALLOCATE.format(self._tile.name),
            "tiled": fill(tile.DESCRIBED, described),
            "scale_queries": tile.SCALE.format(self._factor) if self._factor != 1.0 else "",
            "beneath": read if self._beneath else tile.ZERO,
            "read_tile": "" if self._beneath else read,
            "release_tile": release if self._beneath else "",
            # What has been asked for from shared memory may still be on its way: only what used it tells that it came.
            "release_added": "" if self._beneath else release,
            "sums": sums,
        }

    @property
    def _orderly(self) -> bool:
        """Pairs that share a captured tensor stay together."""
        return self._tile is None and super()._orderly

    @property
    def _places(self) -> dict[str, str]:
        if self._tile is None or self._tile.shared_by != "batch":
            return super()._places
        return {**super()._places, "pair": tile.PAIR}

    @property
    def _group(self) -> str:
        """Pairs that read the same values of a captured tensor go together, which the cache holds then."""
        shared = self._tile.shared_by if self._tile else ""
        return {"pairs": self._fitting}.get(shared, shared) or super()._group

    @property
    def _attend(self) -> dict[str, str]:
        found = super()._attend
        loads = "\n".join(c.load_in_loop for c in self.captures if c.in_loop and c not in self._masking)
        return {
            **found,
            "load_captures": as_gluon(loads).replace("BOUNDED and not EVEN", "BOUNDED"),
            "aside": as_gluon(self._sums[1]),
            "moved": " + aside" if self._sums[1] else "",
            "move": "shift = shift - aside" if self._sums[1] else "",
            "pair_type": _PAIR[self.dtype],
            "leave_parameters": parameters(("acc", "total", "peak", "row", "head", *_LEAVE)),
            "leave_arguments": listing(_LEAVE),
        }

    @property
    def _by_run(self) -> bool:
        """Whether masks ask for the run of keys that a tile's rows keep."""
        return self._sure

    @property
    def _attend_names(self) -> tuple[str, ...]:
        return (*super()._attend_names, *(run.NAMES if self._by_run else ()))

    @property
    def _tile_limits(self) -> str:
        return super()._tile_limits + (run.LIMITS if self._by_run else "")

    @cached_property
    def _masking(self) -> tuple[CapturedTensor, ...]:
        """What is read for masks only, and only where a tile's rows keep no run of keys."""
        scored = {leaf for leaf in self.spec.score.walk() if leaf.op == "capture"}
        return tuple(c for c in self.captures if capture(c.index) not in scored) if self._by_run else ()

    @property
    def _score(self) -> str:
        return self._sums[0]

    @cached_property
    def _sums(self) -> tuple[str, str]:
        """The text of the logits, and the lines of what all logits of a row have aside of it, which the shift takes."""
        captures = self.spec.captures
        inner = self._beneath[0] if self._beneath else self.exponent.inner
        column, start = capture(len(captures)), capture(len(captures) + 1)
        slopes: list[str] = []

        def sloped(node: Expr) -> Expr:
            if node.op != "mul" or node.args[1] not in (column, call("neg", column)):
                return node
            slopes.append(_sloped(self.emit(node.args[0]), negative=node.args[1] != column))
            return capture(len(captures) + 1 + len(slopes))

        def moving(leaf: Expr) -> bool:
            index = int(leaf.value or 0) if leaf.op == "capture" else -1
            if 0 <= index < len(captures):
                return captures[index].dims[3] != "-"
            return leaf in (S, J) or (index >= 0 and leaf != start)

        score = split_distances(inner, captures, column, start)
        score, aside = apart(score.replace(sloped), moving) if score.reads(S) else (score, None)
        texts = ("column", "start", *slopes)
        names = {str(capture(len(captures) + n)): text for n, text in enumerate(texts)}
        made: tuple[Kind, ...] = ("float", "int")
        real: tuple[Kind, ...] = ("float",)
        kinds = (*self.spec.capture_kinds, *made, *real * len(slopes))
        text = f"aside = of_rows({emit(aside, names, kinds)}, peak, SCORES)" if aside is not None else ""
        return emit(score, names, kinds), text

    @property
    def _masks(self) -> str:
        above, below = row_limits(self.range, self.emit)
        rest = conjunction(self.range.rest)
        if rest is not None and self._by_run:
            return run.masks(above, below, self.emit(rest), self._masking)
        lines = ["if BOUNDED:", f"    kept = before(first, eights, {above or 'Sk'}, s, BLOCK_N)"]
        lines += [f"    kept &= ~before(first, eights, {below}, s, BLOCK_N)"] if below else []
        lines += [f"    kept &= {self.emit(term)}" for term in self.range.rest]
        lines += ['    x = tl.where(kept, x, float("-inf"))']
        if rest is not None and not self._sure:
            lines += ["else:", f'    x = tl.where({self.emit(rest)}, x, float("-inf"))']
        return "\n".join(lines)

    @property
    def _consumer(self) -> dict[str, str]:
        found = super()._consumer
        tile = f"{found['tile']}\nblock = stop - 1"
        if self.config.ahead or self.config.groups > 2:
            # One that runs ahead needs that for its first products; three groups of warps have no registers to spare.
            recall = {
                "recall": self._recalled("turn - 1"),
                "recall_last": self._recalled(f"{self._places['turns']} - 1"),
            }
            early = {"before_products": f"{tile}\n{stream.QUERY}", "beside_products": ""}
            return {**found, **early, **recall, "no_tile": "", "remember": ""}
        late = {"before_products": stream.FIRST_QUERY, "beside_products": tile, "recall": "", "recall_last": ""}
        carried = {"no_tile": "row_before, head_before = 0, 0", "remember": "row_before, head_before = row, head"}
        return {**found, **late, **carried}

    def _recalled(self, turn: str) -> str:
        return fill(stream.RECALL, {"turn": turn, "places": self._places["places"]}).rstrip("\n")

    def _loop(self, last: str, bounded: bool) -> str:
        holes = {"last": last, "query": stream.QUERY, "arguments": self._advancing(str(bounded))}
        return fill(stream.LOOP, holes).rstrip("\n")

    @property
    def _constant_values(self) -> dict[str, object]:
        count = {"TILE_STAGES": tile.stages(self.config, padded(self.head_dim))} if self._tile else {}
        return {**super()._constant_values, "AHEAD": self.config.ahead, **count}


def _kind(captured: Capture) -> type[CapturedTensor]:
    if tile.is_tile(captured):
        return StreamedTile
    return PairedBand if captured.is_band else CapturedTensor


def _sloped(slope: str, negative: bool) -> str:
    """The text of the columns times a slope: of what each is from the first one on a product with a constant."""
    factor = f"{'-' if negative else ''}{slope if slope.isidentifier() else f'({slope})'}"
    far, eights = (f"{factor} * {part}.to(tl.float32)" for part in ("(first - start)", "eights"))
    return f"whole({far}, {eights}, s, BLOCK_N)"
