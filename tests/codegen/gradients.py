"""Gradients of an attention against float64: autograd of the reference, and budgets that know how much was summed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward.recompute import unread
from fxopt.codegen.expression import evaluate, gradient
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import capture
from fxopt.testing import assert_within_budget

#: Captured tensors that need a gradient, beyond those of `EXPRESSIONS`: how they are read, and the shape of the heads.
FLOWS = {
    "slopes": ("s * 0.125 + c0 * float(j - i)", "j <= i", "-h--"),
    "scalar": ("s * c0", None, "----"),
    "per-batch-head": ("c0 * tanh(s * 0.1)", None, "bh--"),
    "rows": ("s * c0", "j <= i", "bhi-"),
    "periodic-rows": ("s * c0", None, "p-i-"),
    "keys": ("s * 0.125 + c0", "(j <= i) & (j > i - 20)", "b--j"),
    "heads-keys": ("s * 0.125 + c0", None, "-h-j"),
    "table": ("s * 0.125 + c0", "j <= i + 2", "-hij"),
    "batch-table": ("s * 0.125 + c0", "j > i - 9", "b-ij"),
    "full-table": ("s * c0", None, "bhij"),
    "one-table": ("s * 0.125 + c0 * c0", "j < 21", "--ij"),
    "periodic-table": ("s * 0.125 + c0", None, "p-ij"),
    "band": ("s * 0.125 + c0", "j <= i + 2", "-h-d"),
    "batch-band": ("s * c0", "(j > i - 9) & (j < 30)", "b--d"),
    "full-band": ("s * 0.125 + c0", "(j >= 3) & (j <= i + 20)", "bh-d"),
    "one-band": ("s * 0.125 + abs(c0)", None, "---d"),
    "periodic-band": ("s * 0.125 + c0", "(i + j) % 3 != 0", "p--d"),
}

#: On a CPU eager's own error in single precision depends on how the processor's library sums: some roundings more.
_ROUNDINGS = {("cpu", torch.float32): 32.0}


def autograd(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None = None,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of the reference, in the dtype of the operands."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    leaves = [c.detach().requires_grad_(c.is_floating_point()) for c in captures]
    asked = [q, k, v, *(c for c in leaves if c.requires_grad)]
    results, cotangents = [reference.attention(q, k, v, leaves, str(spec), seed)], [dout]
    if dlse is not None:
        results.append(torch.logsumexp(reference.logits(spec, q, k, leaves), -1))
        cotangents.append(dlse)
    found = torch.autograd.grad(results, asked, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(asked, found, strict=True)]


def _floor(exact: Sequence[Tensor], inputs: Sequence[Tensor]) -> float:
    roundings = _roundings(inputs)
    if roundings == 1.0:
        return 1.0
    return roundings * max(1.0, *(float(x[x.isfinite()].abs().max()) for x in exact if x.isfinite().any()))


def _roundings(inputs: Sequence[Tensor]) -> float:
    return _ROUNDINGS.get((inputs[0].device.type, inputs[0].dtype), 1.0)


def assert_gradients_within_budget(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    found: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """Compare ``found``, the gradients of q, k, v and of the real captured tensors, with eager's and with float64.

    The gradient of a captured tensor sums terms that largely cancel: the size of the terms is the scale of its budget.
    """
    eager = autograd(spec, inputs, captures, dout, dlse, seed)
    wide = dataclasses.replace(spec, out_dtype=torch.float64)
    doubles = [x.double() for x in inputs]
    read = [c.double() if c.is_floating_point() else c for c in captures]
    exact = autograd(wide, doubles, read, dout.double(), None if dlse is None else dlse.double(), seed)
    precision = inputs[0].dtype
    assert_within_budget(list(found[:3]), eager[:3], exact[:3], floor=_floor(exact[:3], inputs), precision=precision)
    scales = _terms(wide, doubles, read, dout.double(), dlse, seed)
    assert len(found) == len(eager) == 3 + len(scales)
    for n, scale in enumerate(scales, start=3):
        floor = max(scale, 1.0) * _roundings(inputs)
        assert_within_budget(found[n], eager[n], exact[n], floor=floor, precision=precision)


def assert_input_gradients_within_budget(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    found: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None = None,
) -> None:
    """The same of the gradients of q, k and v alone, for kernels that compute no others."""
    eager = autograd(spec, inputs, captures, dout, dlse)[:3]
    wide = dataclasses.replace(spec, out_dtype=torch.float64)
    read = [c.double() if c.is_floating_point() else c for c in captures]
    exact = autograd(wide, [x.double() for x in inputs], read, dout.double(), None if dlse is None else dlse.double())
    precision = inputs[0].dtype
    assert_within_budget(list(found), eager, exact[:3], floor=_floor(exact[:3], inputs), precision=precision)


def _terms(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    seed: Tensor | None,
) -> list[float]:
    """For each real captured tensor, the largest sum of the sizes of the terms of an element of its gradient."""
    q, k, v = inputs
    x_BHST = reference.logits(spec, q, k, captures).requires_grad_()
    weights_BHST = reference.weights(spec, x_BHST)
    weights_BHST = weights_BHST if seed is None else reference.dropped(spec, weights_BHST, seed)
    out = reference.average(spec, weights_BHST, q, v)
    flow = (out * dout).sum() + (0 if dlse is None else (torch.logsumexp(x_BHST, -1) * dlse).sum())
    dx_BHST = torch.autograd.grad(flow, x_BHST)[0].nan_to_num(0.0, 0.0, 0.0)
    s_BHST = reference.raw_scores(spec, q, k)
    readings = reference.read_captures(spec, captures, s_BHST)
    env = reference.environment(spec, s_BHST)
    found = []
    for n, (tensor, how) in enumerate(zip(captures, spec.captures, strict=True)):
        if how.kind == "float":
            slope = evaluate(gradient(spec.score, capture(n)), env, readings)
            terms = unread((dx_BHST * slope).abs(), tensor, how)
            found.append(float(terms.nan_to_num(0.0, 0.0, 0.0).max()) if terms.numel() else 0.0)
    return found
