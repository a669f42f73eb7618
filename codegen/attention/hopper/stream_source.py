"""The source of a Hopper kernel whose blocks of keys are one stream across tiles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from textwrap import indent
from typing import ClassVar, Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor
from fxopt.codegen.attention.distance import apart, split_distances
from fxopt.codegen.attention.gluon import as_gluon, parameters
from fxopt.codegen.attention.hopper import baton, key_run, listed, stream, stream_softmax, tile
from fxopt.codegen.attention.hopper.band import BAND, PairedBand
from fxopt.codegen.attention.hopper.listed import Blocks
from fxopt.codegen.attention.hopper.slopes import SLOPES, parts
from fxopt.codegen.attention.hopper.source import CONSTANTS, SIZES, TILES, HopperText
from fxopt.codegen.attention.hopper.template import RANGE
from fxopt.codegen.attention.hopper.tile import StreamedTile
from fxopt.codegen.attention.portable import phases
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.loops import row_limits
from fxopt.codegen.attention.possible import row_terms
from fxopt.codegen.printing import emit
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import Capture
from fxopt.ir.expression import Expr, J, Kind, S, call, capture, conjunction

_PAIR: Final = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}
_STREAM_BARRIERS: Final = ("ready", "free", "q_free")
#: What the result of a tile leaves with, beside itself.
_LEAVE: Final = ("out_target", "out_tiles", "ROWS", "WIDTH", "MEMBER")
_CLOSE: Final = ("lse_ptr", "Sq", "heads", "ROWS", "MEMBER", "WITH_LSE")
#: What the place of a tile is, beside what its rows read.
_PLACE: Final = ("row", "b", "h", "block", "start", "full_start", "full_stop", "own_start", "own_stop")
#: What the second part of a softmax takes from the first.
_WEIGH: Final = ("p", "x", "total", "decay", "shift")


@dataclass(frozen=True, slots=True)
class Sums:
    """The text of what logits are made of: ``factor·(logits + slope·column among eight) + aside``.

    Attributes:
        logits: of what varies within a row.
        aside: the lines of what all logits of a row have aside of it, which the shift takes.
        slope: what `fxopt.codegen.attention.hopper.slopes` leaves to later; empty where nothing is left.
        factor: the unit of the logits.
    """

    logits: str
    aside: str
    slope: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class StreamText(HopperText):
    """The same where the blocks of keys of all tiles of a program are one stream."""

    _multiplied: ClassVar[tuple[str, ...]] = (*TILES, "out_tiles")
    _left: ClassVar[str] = "out_tiles.index(anew(MEMBER))"

    @property
    def _parts(self) -> tuple[str, ...]:
        limits = listed.RANGE if self.config.listed else RANGE
        return (limits, stream.PRODUCER, stream_softmax.ATTEND, stream.CONSUMER, stream.KERNEL)

    @property
    def _barriers(self) -> tuple[str, ...]:
        return (*_STREAM_BARRIERS, *self._tile_names)

    @property
    def _constants(self) -> tuple[str, ...]:
        return (*CONSTANTS, "AHEAD", *(("TILE_STAGES",) if self._tile else ()))

    @property
    def _scores(self) -> tuple[str, ...]:
        return ("s", self._tile.name) if self._tile and not self._beneath else ("s",)

    @property
    def _range_names(self) -> tuple[str, ...]:
        return (listed.NAME,) if self.config.listed else super()._range_names

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
        scaled = tile.SCALED if self._factor != 1.0 else ""
        slopes = SLOPES if self._sums.slope else ""
        return super()._functions + copies + widened + scaled + slopes + baton.functions(self.config)

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
            "beneath": read if self._beneath else tile.ZERO,
            "read_tile": "" if self._beneath else read,
            "release_tile": release if self._beneath else "",
            # What has been asked for from shared memory may still be on its way: only what used it tells that it came.
            "release_added": "" if self._beneath else release,
            "sums": sums,
        }

    @property
    def _scaled(self) -> str:
        """The lines that multiply the queries of a new tile."""
        if self._factor == 1.0:
            return ""
        return "if begins:\n" + indent(tile.SCALE.format(self._factor), "    ")

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
        read = (name for name in self._attend_names if name not in ("i", "Sq"))
        names = (*self._scores, *read, "row", "Sq")
        constants = ("partial", "BLOCK_N", "ROWS", "MEMBER", "SCORES")
        sloping = (name for name in self._attend_names if re.search(rf"\b{name}\b", self._sums.slope))
        weigh = (*_WEIGH, *sloping, "BLOCK_N")
        loads = found["load_captures"].replace("if BOUNDED:", "if partial:")
        return {
            **found,
            "load_captures": loads,
            "attend_parameters": parameters((*names, "start", *constants)),
            "attend_arguments": listing((*names, self._blocks.key, *constants)),
            "weigh_parameters": parameters(weigh),
            "weigh_arguments": listing(weigh),
            "aside": as_gluon(self._sums.aside),
            "moved": self._moved,
            "move": "shift = shift - aside" if self._sums.aside else "",
            **self._powers,
            "pair_type": _PAIR[self.dtype],
            "close_parameters": parameters(("total", "peak", "row", "b", "h", *_CLOSE)),
            "close_arguments": listing(_CLOSE),
            "leave_parameters": parameters(("acc", "row", "b", "h", *_LEAVE)),
            "leave_arguments": listing(_LEAVE),
        }

    @property
    def _moved(self) -> str:
        """What makes maxima of logits those of a row."""
        factor = f" * {self._sums.factor!r}" if self._sums.factor != 1.0 else ""
        return factor + (" + aside" if self._sums.aside else "")

    @property
    def _powers(self) -> dict[str, str]:
        """The lines of the exponential."""
        slope, plan = self._sums.slope, self.exponent
        if not slope:
            return {"far": "", "farther": "", "weights": f"gl.exp2({as_gluon(plan.text)})"}
        scale = f"unit * {self._sums.factor!r}"
        return {
            "far": f"far = within(x, {slope}, BLOCK_N)",
            "farther": " + far",
            "unit": as_gluon(plan.unit) or f"unit = gl.full([64], {plan.scale}, gl.float32, layout=shift.type.layout)",
            "weights": f"powers(x, far, {scale}, shift * unit, BLOCK_N)",
        }

    @property
    def _score(self) -> str:
        return self._sums.logits

    @cached_property
    def _sums(self) -> Sums:
        """The texts of the logits."""
        captures = self.spec.captures
        inner = self._beneath[0] if self._beneath else self.exponent.inner
        column, start = capture(len(captures)), capture(len(captures) + 1)
        slopes: list[str] = []

        def sloped(node: Expr) -> Expr:
            if node.op != "mul" or node.args[1] not in (column, call("neg", column)):
                return node
            slopes.append(_signed(self.emit(node.args[0]), negative=node.args[1] != column))
            return capture(len(captures) + 1 + len(slopes))

        def moving(leaf: Expr) -> bool:
            index = int(leaf.value or 0) if leaf.op == "capture" else -1
            if 0 <= index < len(captures):
                return captures[index].dims[3] != "-"
            return leaf in (S, J) or (index >= 0 and leaf != start)

        score = split_distances(inner, captures, column, start)
        score, aside = apart(score.replace(sloped), moving) if score.reads(S) else (score, None)
        places = [capture(len(captures) + 2 + n) for n in range(len(slopes))]
        found = parts(score, places.__contains__)
        texts = ("column", "start", *map(_whole, slopes))
        names = {str(capture(len(captures) + n)): text for n, text in enumerate(texts)}
        made: tuple[Kind, ...] = ("float", "int")
        real: tuple[Kind, ...] = ("float",)
        kinds = (*self.spec.capture_kinds, *made, *real * len(slopes))
        text = f"aside = of_rows({emit(aside, names, kinds)}, peak, SCORES)" if aside is not None else ""
        if found is None:
            return Sums(emit(score, names, kinds), text)
        signed = (_signed(slopes[places.index(place)], sign < 0) for place, sign in found.signs)
        slope = " + ".join(signed)
        if found.factor != 1.0:
            slope = f"({slope}) * {1 / found.factor!r}"
        return Sums(f"along({emit(found.rest, names, kinds)}, {slope}, BLOCK_N)", text, slope, found.factor)

    @cached_property
    def _vectors(self) -> tuple[CapturedTensor, ...]:
        """The captured vectors that are read where the run of a tile's keys is not known."""
        late = self._sure or self.config.listed
        return key_run.vectors(self.spec, self.range, self.captures) if late else ()

    @property
    def given(self) -> tuple[CapturedTensor, ...]:
        """All but those."""
        return tuple(c for c in self.captures if c not in self._vectors)

    @property
    def _attend_names(self) -> tuple[str, ...]:
        late = {name for c in self._vectors for name in c.attend_names}
        found = [name for name in super()._attend_names if name not in late]
        found += [name for c in self._vectors for name in (c.parameter, *c.strides, *c.period)]
        found += [*key_run.indices(self._vectors), *(key_run.NAMES if self._sure else ())]
        return tuple(dict.fromkeys(found))

    @property
    def _masks(self) -> str:
        above, below = row_limits(self.range, self.emit)
        rest = conjunction(self.range.rest)
        lines = ["if partial:", f"    words = before({above or 'Sk'}, start, s, BLOCK_N)"]
        lines += [f"    words &= ~before({below}, start, s, BLOCK_N)"] if below else []
        if self._sure:
            masks = key_run.masks(self._vectors, row_terms(self.spec), tuple(self.range.rest), self.emit)
            return "\n".join((*lines, indent(masks, "    ")))
        if self.config.listed:
            masks = key_run.every_mask(self._vectors, tuple(self.range.rest), self.emit)
            return "\n".join((*lines, indent(masks, "    ")))
        lines += ["    kept = chosen(words, s, BLOCK_N)", '    x = tl.where(kept, x, float("-inf"))']
        if rest is not None:
            lines += [f'x = tl.where({self.emit(rest)}, x, float("-inf"))']
        return "\n".join(lines)

    @property
    def _consumer(self) -> dict[str, str]:
        ahead = bool(self.config.ahead)
        own = (*("own_first", "own_last"), *self._range_names[2:], "BLOCK_N")
        places = {
            "located_first": f"({', '.join((*_PLACE, *self._located))})",
            "locate_arguments": listing(self._locating),
        }
        found = fill(stream.LOCATE, places).rstrip("\n")
        bounds = {"own_range_arguments": listing(own)}
        return {
            **super()._consumer,
            **places,
            "locate_parameters": parameters(self._locating),
            "own": stream.ALL if self.config.listed else fill(stream.OWN, bounds).rstrip("\n"),
            **self._blocks.holes,
            "located": listing(self._located),
            "run_limits": key_run.limits(bool(row_terms(self.spec))) if self._sure else "",
            "early": f"{found}\n{stream.QUERY_AHEAD}" if ahead else f"{stream.QUERY}\n{self._scaled}",
            "late": "" if ahead else "\n".join((found, self._blocks.next)),
            **self._softmax,
            **baton.holes(self.config),
        }

    @property
    def _blocks(self) -> Blocks:
        """How a place in the stream tells which block it is."""
        return Blocks(self._hull_lists, self.config.listed, self._partial_at_start)

    @property
    def _softmax(self) -> dict[str, str]:
        """The lines from products to weights."""
        follows = not self.config.listed and any(bound.follows_rows for bound in self.range.bounds)
        late = (
            (stream_softmax.SOFTEN_NEEDED, stream_softmax.WEIGH_NEEDED)
            if follows
            else (stream_softmax.SOFTEN, stream_softmax.WEIGH)
        )
        texts = (stream_softmax.SOFTEN_EARLY, stream_softmax.WEIGH_EARLY) if self._early else late
        lines = (fill(text, {**self._attend, "block": self._blocks.name}).rstrip("\n") for text in texts)
        in_use = "acc, p, fresh" if self._early else "acc, p"
        return dict(zip(("soften", "weigh"), lines, strict=True)) | {"in_use": in_use}

    @property
    def _early(self) -> bool:
        """Whether weights are computed beside products of the same group, which takes registers for both of them."""
        return padded(self.head_dim) > 64

    @property
    def _locating(self) -> tuple[str, ...]:
        """What tells where a tile lies."""
        hull = ("HULL",) if self._hull else ()
        return ("turn", "MEMBER", *self._pointers, *SIZES, "ROWS", "BLOCK_N", *hull, "SCORES")

    @property
    def _located(self) -> tuple[str, ...]:
        """What a block update needs of its tile."""
        given = (*self._pointers, *SIZES, "total", "peak", "i", *_PLACE)
        found = tuple(name for name in self._attend_names if name not in given)
        return (*found, listed.NAME) if self._blocks.are_listed else found

    @property
    def _constant_values(self) -> dict[str, object]:
        count = {"TILE_STAGES": tile.stages(self.config, padded(self.head_dim))} if self._tile else {}
        return {**super()._constant_values, "AHEAD": self.config.ahead, **count}


def _kind(captured: Capture) -> type[CapturedTensor]:
    if tile.is_tile(captured):
        return StreamedTile
    return PairedBand if captured.is_band else CapturedTensor


def _signed(slope: str, negative: bool) -> str:
    return f"{'-' if negative else ''}{slope if slope.isidentifier() else f'({slope})'}"


def _whole(slope: str) -> str:
    """The text of the columns times a slope: of what each is from the first one on a product with a constant."""
    far, eights = (f"{slope} * {part}.to(tl.float32)" for part in ("(first - start)", "eights"))
    return f"whole({far}, {eights}, s, BLOCK_N)"
