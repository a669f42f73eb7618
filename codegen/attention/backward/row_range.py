"""Which query rows a block of keys needs: the bounds that a mask sets on the keys, asked the other way round.

    j <= i + c  <=>  i >= j − c,      j >= i + c  <=>  i <= j − c

Per block of keys ``first … last``: rows from ``start_block`` to ``stop`` need some key, those from ``full_start`` to
``full_stop``, whole blocks, need every key. A bound that is the same for all rows lets all of them through or none.
"""

from __future__ import annotations

from fxopt.codegen.attention.interval import Bound, KeyRange
from fxopt.codegen.attention.portable.loops import Emitter, Span, nested
from fxopt.codegen.expression import simplify
from fxopt.ir.expression import J, call, const


def row_spans(found: KeyRange) -> tuple[Span, ...]:
    """The loops over rows in order."""
    starts = any(b.slope for b in found.side("upper"))
    others = any(b.side == "lower" or not b.slope for b in found.bounds)
    # Without other bounds the only rows after the full blocks are those of a last block cut short.
    tail = Span("tl.maximum(full_start, full_stop)", "stop", True, loops=others, beyond=not others)
    if not starts:
        return (Span("0", "full_stop", False), Span("full_stop", "stop", True, loops=others, beyond=not others))
    return (Span("start_block", "tl.minimum(full_start, stop)", True), Span("full_start", "full_stop", False), tail)


def row_range_text(found: KeyRange, emit: Emitter) -> str:
    """The lines that compute the limits which `row_spans` names."""
    starts = [b for b in found.side("upper") if b.slope]
    stops = [b for b in found.side("lower") if b.slope]
    lines = [
        f"stop = {nested('minimum', 'Sq', (_limit(b, 'last', 1, emit) for b in stops))}",
        f"full_stop = {nested('minimum', 'Sq', (_limit(b, 'first', 1, emit) for b in stops))}",
        *(line for b in found.bounds if not b.slope for line in _switch(b, emit)),
        "full_stop = tl.maximum(full_stop, 0) // BLOCK_M * BLOCK_M",
    ]
    if starts:
        start = nested("maximum", "0", (_limit(b, "first", 0, emit) for b in starts))
        full_start = nested("maximum", "0", (_limit(b, "last", 0, emit) for b in starts))
        lines.append(f"start_block = {start} // BLOCK_M * BLOCK_M")
        lines.append(f"full_start = tl.cdiv({full_start}, BLOCK_M) * BLOCK_M")
    return "\n".join(lines)


def _limit(bound: Bound, key: str, beyond: int, emit: Emitter) -> str:
    limit = simplify(call("sub", call("add", J, const(beyond)), bound.offset))
    text = emit(limit, {"j": key})
    if not any(node.op == "capture" for node in bound.offset.walk()):
        return text
    # Captured offsets may be int64; the loops run in int32, which any limit within the rows fits.
    return f"tl.minimum(tl.maximum({text}, -1), Sq).to(tl.int32)"


def _switch(bound: Bound, emit: Emitter) -> tuple[str, str]:
    offset = emit(bound.offset, {})
    some, every, compared = ("first", "last", "<=") if bound.side == "upper" else ("last", "first", ">=")
    return (
        f"stop = tl.where({some} {compared} {offset}, stop, 0)",
        f"full_stop = tl.where({every} {compared} {offset}, full_stop, 0)",
    )
