"""The loops over key blocks of a generated kernel: where they start and stop, and which blocks are full.

Per block of rows ``first … last``: keys from ``start`` to ``stop`` count for some row, those from ``full_start`` to
``full_stop``, whole blocks, for every row. Blocks before and after the full ones are bounded. Where captured vectors
limit the keys as well (`fxopt.codegen.attention.portable.hull`), the blocks are those from ``hull_start`` to
``hull_stop``, and in full blocks what they say is still evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fxopt.codegen.attention.interval import Bound, KeyRange
from fxopt.codegen.expression import simplify
from fxopt.ir.expression import Expr, I, call, const

#: Prints an expression, given the names of its leaves.
Emitter = Callable[[Expr, Mapping[str, str]], str]


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks from ``first`` to ``last``.

    Attributes:
        first: the key they start with.
        last: the key they stop before.
        bounded: whether they may hold keys that some row does without.
        loops: whether they can be more than one.
        beyond: whether there are any only where the last block is cut short by the end of the keys.
    """

    first: str
    last: str
    bounded: bool
    loops: bool = True
    beyond: bool = False


def loop_spans(found: KeyRange, hull: bool = False) -> tuple[Span, ...]:
    """The loops in order; ``hull`` tells that captured vectors limit the keys."""
    # A limit that is the same for all rows of a block cuts one block of keys only.
    loops = any(b.follows_rows for b in found.side("upper"))
    if not found.side("lower"):
        first, after = ("hull_start", "tail_start") if hull else ("0", "full_stop")
        tail = Span(after, "stop", True, loops=loops, beyond=not found.side("upper"))
        return (Span(first, "full_stop", False), tail)
    return (
        Span("start_block", "tl.minimum(full_start, stop)", True),
        Span("full_start", "full_stop", False),
        Span("tl.maximum(full_start, full_stop)", "stop", True),
    )


def key_range_text(found: KeyRange, emit: Emitter, hull: bool = False) -> str:
    """The lines that compute the limits which `loop_spans` names."""
    upper, lower = found.side("upper"), found.side("lower")
    begin, end = (["hull_start"], ["hull_stop"]) if hull else ([], [])
    lines = [stop_text(found, emit, end)]
    full_stop = nested("minimum", "Sk", (*(_limit(b, "first", 1, emit) for b in upper), *end))
    lines.append(f"full_stop = {full_stop}")
    lines.append("full_stop = tl.maximum(full_stop, 0) // BLOCK_N * BLOCK_N")
    if lower:
        full_start = nested("maximum", "0", (*(_limit(b, "last", 0, emit) for b in lower), *begin))
        lines.append(start_text(found, emit, begin))
        lines.append(f"full_start = tl.cdiv({full_start}, BLOCK_N) * BLOCK_N")
    elif hull:
        lines.append("tail_start = tl.maximum(hull_start, full_stop)")
    return "\n".join(lines)


def stop_text(found: KeyRange, emit: Emitter, ends: Sequence[str] = ()) -> str:
    """The line that computes ``stop``, not beyond any of ``ends``."""
    limits = (_limit(b, "last", 1, emit) for b in found.side("upper"))
    return f"stop = {nested('minimum', 'Sk', (*limits, *ends))}"


def start_text(found: KeyRange, emit: Emitter, begins: Sequence[str] = ()) -> str:
    """The line that computes ``start_block``, the first key of the block that holds the first one needed."""
    limits = (_limit(b, "first", 0, emit) for b in found.side("lower"))
    return f"start_block = {nested('maximum', '0', (*limits, *begins))} // BLOCK_N * BLOCK_N"


def row_limits(found: KeyRange, emit: Emitter) -> tuple[str, str]:
    """One past the last key, and the first one, that each of the rows ``i`` keeps; empty where no bound says."""
    above = [_limit(b, "i", 1, emit) for b in found.side("upper")]
    below = [_limit(b, "i", 0, emit) for b in found.side("lower")]
    return nested("minimum", "Sk", above) if above else "", nested("maximum", "0", below) if below else ""


def _limit(bound: Bound, row: str, beyond: int, emit: Emitter) -> str:
    first, *others = (_single_limit(b, row, beyond, emit) for b in bound.all)
    return nested("maximum" if bound.side == "upper" else "minimum", first, others)


def _single_limit(bound: Bound, row: str, beyond: int, emit: Emitter) -> str:
    offset = simplify(call("add", bound.offset, const(beyond)))
    begin = I if bound.chunk == 1 else call("mul", call("floordiv", I, const(bound.chunk)), const(bound.chunk))
    limit = simplify(call("add", begin, offset)) if bound.slope else offset
    text = emit(limit, {"i": row})
    if not any(node.op == "capture" for node in offset.walk()):
        return text
    # Captured lengths may be int64; the loops run in int32, which any limit within the keys fits.
    return f"tl.minimum(tl.maximum({text}, -1), Sk).to(tl.int32)"


def nested(function: str, first: str, others: Iterable[str]) -> str:
    """Calls of ``tl.minimum`` or ``tl.maximum`` that fold ``others`` into ``first``."""
    text = first
    for other in others:
        text = f"tl.{function}({text}, {other})"
    return text
