"""Masks by proof: a mask that does not depend on the inputs is evaluated and compared with structural hypotheses.

The comparison runs over every element, so an accepted hypothesis is proved for the captured sizes.
"""

from __future__ import annotations

import torch

from fxopt.ir.expression import Expr, I, J, call, conjunction, const


def prove_structure(keep: torch.Tensor) -> Expr | None:
    """A closed form of a boolean mask ``keep [S, T]`` over query row ``i`` and key column ``j``.

    Tries, in order: everything kept (``True``), causal with an offset (``j <= i + c``), a window (``j >= i - w``),
    their conjunction. ``None`` when no hypothesis holds for all elements.
    """
    if keep.dim() != 2 or keep.numel() == 0:
        return None
    if bool(keep.all()):
        return const(True)
    if not bool(keep.any()):
        return None
    rows = torch.arange(keep.shape[0], dtype=torch.int32, device=keep.device)[:, None]
    columns = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device)[None, :]
    distance, beyond = columns - rows, sum(keep.shape)
    highest = int(torch.where(keep, distance, -beyond).max())
    lowest = int(torch.where(keep, distance, beyond).min())
    upper, lower = columns <= rows + highest, columns >= rows + lowest
    terms = [t for t, mask in ((_upper(highest), upper), (_lower(lowest), lower)) if not bool(mask.all())]
    return conjunction(tuple(terms)) if terms and torch.equal(keep, upper & lower) else None


def one_plane(values: torch.Tensor) -> torch.Tensor | None:
    """The ``[S, T]`` plane that all leading indices share, or ``None`` when they differ."""
    while values.dim() < 2:
        values = values[None]
    flat = values.reshape(-1, *values.shape[-2:])
    return flat[0] if bool((flat == flat[:1]).all()) else None


def every_row_keeps_a_key(keep: torch.Tensor) -> bool:
    """Whether no query row of ``keep [S, T]`` is fully masked."""
    return bool(keep.any(dim=-1).all())


def as_additive(values: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
    """Read an additive mask as ``(keep, finite)``: 0 where kept, and elsewhere −inf or the lowest number of a dtype.

    ``finite`` is true when the masked value is a lowest finite number, so that a fully masked row is not NaN. ``None``
    when the tensor holds anything else.
    """
    keep = values == 0
    infinite = torch.isneginf(values)
    lowest = torch.zeros_like(keep)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, values.dtype):
        lowest |= values == torch.finfo(dtype).min
    if not bool((keep | infinite | lowest).all()):
        return None
    return keep, not bool(infinite.any())


def _upper(offset: int) -> Expr:
    return call("le", J, call("add", I, const(offset)) if offset else I)


def _lower(offset: int) -> Expr:
    return call("ge", J, call("add", I, const(offset)) if offset else I)
