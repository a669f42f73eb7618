"""Lowering of ``fxopt::residual_layer_norm`` and ``fxopt::residual_rms_norm``: a generated kernel where that is faster.

The competitor is the kernel that Inductor makes of the same sum and norm. It is compiled for the measurement, so there
is one measurement for each kind, width, dtypes, surroundings and power of two of rows; it is kept in the cache,
and none is begun after `_BUDGET` seconds of them in a process. A tie leaves sum and norm as they were.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.gradients import may_need_gradient
from fxopt.codegen.building import compile_together
from fxopt.codegen.launching import rows_objection
from fxopt.codegen.norm.residual_norm import operator as residual_norm
from fxopt.codegen.norm.residual_norm.config import backward_candidates
from fxopt.codegen.norm.residual_norm.config import candidates as forward_candidates
from fxopt.codegen.norm.residual_norm.kernel import backward_objection
from fxopt.codegen.norm.residual_norm.problem import objection, problem_of
from fxopt.ir.decision import Decision
from fxopt.ir.nodes import arguments, is_call, tensor
from fxopt.ir.operators import overload
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.contest import SMALLEST, TIE, Terms, decide, measured
from fxopt.lowering.decisions import forced, has_hint
from fxopt.lowering.measure import hint, layout, materialise
from fxopt.lowering.probe import PLAIN, Base, Probe
from fxopt.lowering.surroundings import fusion_objection, surroundings
from fxopt.lowering.versions import fingerprint

__all__ = ["NAMES", "candidates", "choose", "residual_norm"]

#: The operators that are lowered here.
NAMES: Final = ("residual_layer_norm", "residual_rms_norm")
_TIE: Final = TIE
_SMALLEST: Final = SMALLEST
#: The longest rows that are not measured: forward Inductor's kernel takes them at the rate of a copy, as ours does, and
#: in training ours was up to 17% slower (`benchmarks/results/h100-residual-norm.json`).
_NOTHING_GAINED: Final = 1024
#: Seconds of measurements after which a process begins no more.
_BUDGET: Final = 2.0
_spent: Final = {"seconds": 0.0}


@dataclass(frozen=True)
class _Site:
    """The arguments of a residual norm: nodes, and constants."""

    node: Node
    training: bool

    @property
    def kind(self) -> str:
        return "rms_norm" if is_call(self.node, overload("residual_rms_norm")) else "layer_norm"

    @property
    def operands(self) -> tuple[Node | None, ...]:
        """x, residual, weight and bias."""
        given = arguments(self.node)
        return tuple(given.get(name) for name in ("x", "residual", "weight", "bias"))

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Their fake tensors."""
        x, residual, weight, bias = (None if node is None else tensor(node) for node in self.operands)
        assert x is not None and residual is not None
        return x, residual, weight, bias

    @property
    def settings(self) -> tuple[float, torch.dtype, bool]:
        """eps, the dtype that is computed in, and whether weight and bias come after rounding."""
        given = arguments(self.node)
        return given["eps"], given["dtype"], given["scale_after_cast"]

    @property
    def sum_read(self) -> bool:
        return any(is_call(user, operator.getitem) and user.args[1] == 1 and user.users for user in self.node.users)

    @property
    def wanted(self) -> tuple[bool, bool]:
        """Whether weight and bias need gradients."""
        weight, bias = (node is not None and may_need_gradient(node) for node in self.operands[2:])
        return weight, bias


def candidates(site: Node, training: bool) -> tuple[list[Candidate], dict[str, str]]:
    """The ways to run ``site``, best guess first and the plain meaning last; and why others can't."""
    found = _Site(site, training)
    plain = Candidate(PLAIN, "aten", overload(f"residual_{found.kind}"))
    reason = _objection(found)
    if reason is not None:
        return [plain], {"triton": reason}
    eps, _, scale_after_cast = found.settings
    fixed = (*found.operands, found.kind, eps, scale_after_cast)
    flags = (training or found.sum_read, training)
    target = torch.ops.fxopt.residual_norm_forward.default
    generated = [Candidate(f"triton-{c}", "triton", target, arguments=(*fixed, c, *flags)) for c in _configs(found)]
    return [*generated, plain], {}


def _configs(site: _Site) -> list[str]:
    """Forward configurations, in training each pair of best guesses and the best forward with the other backward."""
    width = int(site.values[0].shape[-1])
    forward = forward_candidates(width)
    if not site.training:
        return list(forward)
    backward = backward_candidates(width)
    return [f"{forward[0]}/{backward[0]}", f"{forward[1]}/{backward[1]}"]


def _objection(site: _Site) -> str | None:
    x, residual, weight, bias = site.values
    eps, dtype, scale_after_cast = site.settings
    problem = problem_of(x, residual, weight, bias, site.kind, eps, scale_after_cast)
    checks = (
        None if x.device.type == "cuda" else f"Triton kernels run on CUDA devices, not on {x.device.type}",
        None if find_spec("triton") else "triton is not installed",
        None if x.dim() > 1 else "it is a single row",
        None if dtype == torch.float32 else f"it is computed in {dtype}",
        backward_objection(problem) if site.training else objection(problem),
        rows_objection(x) and f"x: {rows_objection(x)}",
        rows_objection(residual) and f"residual: {rows_objection(residual)}",
        "an operand is empty" if any(size == 0 for size in x.shape if isinstance(size, int)) else None,
    )
    return next(filter(None, checks), None)


def choose(
    site: Node, training: bool, lower: str, strict: bool = False, base: Base | None = None
) -> tuple[Candidate, Decision]:
    """The candidate to run ``site``: forced by ``lower="triton"`` or ``"aten"``, or what measures as the fastest.

    Args:
        site: a call of one of the operators.
        training: whether there will be a backward.
        lower: the option of that name; ``"sdpa"`` is about attention and leaves a norm as it is.
        strict: raise where what was forced can't serve.
        base: how the rest of the graph is compiled.
    """
    found, refused = candidates(site, training)
    if lower in ("triton", "aten"):
        return forced(site, found, refused, lower, strict)
    plain = found[-1]

    def kept(reason: str) -> tuple[Candidate, Decision]:
        return plain, Decision((site.name,), plain.name, reason)

    if lower != "auto":
        return kept(f"lower={lower!r} is about attention")
    if len(found) == 1:
        return kept(f"the only one that can serve (triton: {refused['triton']})")
    reason = fusion_objection(site)
    if reason is not None:
        return kept(f"not measured: {reason}")
    if not all(
        has_hint(size) for x in _Site(site, training).values if x is not None for size in (*x.shape, *x.stride())
    ):
        return kept("not measured: the sizes are not known")
    width = hint(_Site(site, training).values[0].shape[-1])
    if width <= _NOTHING_GAINED:
        return kept(f"not measured: rows of {width} elements; up to {_NOTHING_GAINED} nothing was gained on an H100")
    return _measured(_Site(site, training), found, base or Base())


def _measured(site: _Site, found: Sequence[Candidate], base: Base) -> tuple[Candidate, Decision]:
    terms = Terms("norms", _spent, _BUDGET, _TIE, _SMALLEST)
    measure = partial(_measure, site, found, base)
    return decide(site.node.name, _key(site, found, base), found, measure, terms)


def _measure(site: _Site, found: Sequence[Candidate], base: Base, failed: dict[str, str]) -> dict[str, float]:
    """Median seconds of each candidate, forward and backward; one that fails is left out, and put among ``failed``."""
    x, residual, weight, bias = (
        None if value is None else materialise(value, *layout(value), seed) for seed, value in enumerate(site.values)
    )
    assert x is not None and residual is not None
    around = surroundings(site.node, site.training)
    probe = Probe(site.kind, site.settings, (x, residual, weight, bias), around, site.wanted, site.training)
    names = [candidate.name for candidate in found if candidate.name != PLAIN]
    with torch.no_grad():
        if x.is_cuda:
            compile_together([launch for name in names for launch in probe.launches(name)])
        return measured(names, probe.launches, partial(probe.calls, base=base), x.device, failed)


def _key(site: _Site, found: Sequence[Candidate], base: Base) -> str:
    x = site.values[0]
    rows = math.prod(hint(size) for size in x.shape[:-1])
    operands = [None if value is None else str(value.dtype) for value in site.values]
    facts = [
        f"residual {site.kind} {site.settings} over {hint(x.shape[-1])}: {operands}",
        f"rows<={1 << max(rows - 1, 0).bit_length()}",
        f"{surroundings(site.node, site.training)} {site.wanted if site.training else ''}",
        "training" if site.training else "inference",
        f"base {base}",
        *(candidate.name for candidate in found),
    ]
    return "\n".join([*facts, fingerprint(x.device)])
