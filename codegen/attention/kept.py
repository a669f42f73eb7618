"""How many blocks of keys the rows of an attention go through: those that its mask leaves, by bounds or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from fxopt.codegen.attention.borders import decision
from fxopt.codegen.attention.interval import Bound, key_range
from fxopt.codegen.expression import evaluate
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, conjuncts


@lru_cache(maxsize=1024)
def kept_blocks(spec: AttentionSpec, rows: int, keys: int, block_rows: int, block_keys: int) -> tuple[int, ...]:
    """The number of blocks of ``block_keys`` keys that each block of ``block_rows`` rows of a head goes through.

    Bounds by captured tensors, batch or head are not known here, and taken to leave everything.
    """
    found = key_range(spec, further=True)
    sizes = {"Sq": rows, "Sk": keys}
    upper = [_limits(bound, sizes) for bound in found.side("upper")]
    lower = [_limits(bound, sizes) for bound in found.side("lower")]
    counts = []
    for first in range(0, rows, block_rows):
        last = min(first + block_rows, rows) - 1
        stop = min([keys, *(max(_at(part, last) for part in parts) + 1 for parts in upper if parts)])
        start = max([0, *(min(_at(part, first) for part in parts) for parts in lower if parts)])
        counts.append(max(0, -(-stop // block_keys) - start // block_keys))
    return tuple(counts)


@lru_cache(maxsize=1024)
def listed_blocks(spec: AttentionSpec, rows: int, keys: int, block_rows: int, block_keys: int) -> tuple[int, ...]:
    """The same of those that are left out one by one, where the borders of a block tell that nothing of it is kept.

    Conjuncts by captured tensors, batch or head are not known here, and taken to leave everything.
    """
    first = torch.arange(0, rows, block_rows)[:, None]
    start = torch.arange(0, keys, block_keys)[None, :]
    borders = (first, (first + block_rows).clamp(max=rows) - 1, start, (start + block_keys).clamp(max=keys) - 1)
    # What is captured is not read.
    captures = (*(torch.zeros((), dtype=torch.int64) for _ in spec.captures), *borders)
    some = torch.ones(len(first), start.shape[1], dtype=torch.bool)
    for term in filter(_is_known, conjuncts(spec.mask)):
        some &= torch.as_tensor(evaluate(decision(term, spec.captures).some, {"Sq": rows, "Sk": keys}, captures))
    counts: list[int] = some.sum(1).tolist()
    return tuple(counts)


def _is_known(term: Expr) -> bool:
    return not any(leaf.op == "capture" or leaf.value in ("b", "h", "s") for leaf in term.leaves)


#: ``slope``, ``offset`` and ``chunk`` of a bound.
_Line = tuple[int, int, int]


def _limits(bound: Bound, sizes: dict[str, int]) -> Sequence[_Line]:
    """A bound and its alternatives as numbers; none where one of them is no number yet."""
    parts = bound.all
    if any(leaf.op == "capture" or leaf.value in ("b", "h") for part in parts for leaf in part.offset.walk()):
        return ()
    return [(part.slope, int(evaluate(part.offset, sizes)), part.chunk) for part in parts]


def _at(line: _Line, row: int) -> int:
    slope, offset, chunk = line
    return slope * (row // chunk * chunk) + offset
