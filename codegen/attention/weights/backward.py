"""Gradients of attention weights and of statistics of them: the meaning is computed anew and differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxopt.codegen.attention.weights.reference import exact_weights
from fxopt.codegen.attention.weights.wants import Want, of_want
from fxopt.ir.attention import AttentionSpec


def gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    wanted: Sequence[bool],
    want: Want,
    grad: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of ``q``, ``k`` and of the captures that are ``wanted`` (``None`` for the others).

    Args:
        spec: the attention.
        q: ``[B, H, S, D]``.
        k: ``[B, G, T, D]``.
        captures: the captured tensors.
        wanted: which of them need a gradient.
        want: what was computed of the weights.
        grad: of the result, in its shape.
    """
    places = [n for n, want in enumerate(wanted) if want]

    def result(q: Tensor, k: Tensor, *changing: Tensor) -> Tensor:
        given = dict(zip(places, changing, strict=True))
        read = want.captures(spec, [given.get(n, c) for n, c in enumerate(captures)])
        weights_BHST = exact_weights(of_want(spec, want, q.shape[2]), q[:, :, want.cut], k, read)
        return replace(want, rows=None).of(weights_BHST)

    pull_back = torch.func.vjp(result, q, k, *(captures[n] for n in places))[1]
    dq, dk, *changing = pull_back(grad)
    found: dict[int, Tensor] = dict(zip(places, changing, strict=True))
    return dq, dk, [found.get(n) for n in range(len(captures))]
