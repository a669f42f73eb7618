"""Gradients of attention weights and of statistics of them: the meaning is computed anew and differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.codegen.attention.weights.reference import exact_weights, reduction
from fxopt.ir.attention import AttentionSpec


def gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    wanted: Sequence[bool],
    kind: str,
    grad: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of ``q``, ``k`` and of the captures that are ``wanted`` (``None`` for the others).

    Args:
        spec: the attention.
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        captures: the captured tensors.
        wanted: which of them need a gradient.
        kind: ``"weights"``, ``"column_sum"`` or ``"diagonal"``.
        grad: of the result, in its shape.
    """
    places = [n for n, want in enumerate(wanted) if want]

    def result(q: Tensor, k: Tensor, *changing: Tensor) -> Tensor:
        given = dict(zip(places, changing, strict=True))
        weights_BHST = exact_weights(spec, q, k, [given.get(n, c) for n, c in enumerate(captures)])
        found = weights_BHST if kind == "weights" else reduction(kind)(weights_BHST)
        return found.to(spec.out_dtype)

    pull_back = torch.func.vjp(result, q, k, *(captures[n] for n in places))[1]
    dq, dk, *changing = pull_back(grad)
    found: dict[int, Tensor] = dict(zip(places, changing, strict=True))
    return dq, dk, [found.get(n) for n in range(len(captures))]
