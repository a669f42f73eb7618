"""Lowering of ``fxopt::mlp``: a generated kernel for narrow blocks in inference, where that is faster.

The competitor is what Inductor makes of the same block, which writes the hidden elements and reads them again. There is
one measurement for each kind, widths, dtype, readers and power of two of rows; it is kept in the cache, and none is
begun after `_BUDGET` seconds of them in a process. A tie leaves the layers as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.codegen.building import compile_together
from fxopt.codegen.launching import rows_objection
from fxopt.codegen.mlp import reference
from fxopt.codegen.mlp.narrow_mlp import operator as narrow_mlp
from fxopt.codegen.mlp.narrow_mlp.config import candidates as configs
from fxopt.codegen.mlp.narrow_mlp.problem import Problem, objection, operands_objection, problem_of
from fxopt.ir.decision import Decision
from fxopt.ir.nodes import arguments, tensor
from fxopt.ir.operators import overload
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.contest import Terms, decide, measured
from fxopt.lowering.decisions import forced, has_hint
from fxopt.lowering.measure import hint, layout, materialise
from fxopt.lowering.probe import PLAIN, Base
from fxopt.lowering.surroundings import Followers, followers, residual_objection
from fxopt.lowering.versions import fingerprint

__all__ = ["NAMES", "candidates", "choose", "narrow_mlp"]

#: The operators that are lowered here.
NAMES: Final = ("mlp",)
#: Rows below which the weights weigh more than the hidden elements, and launching more than both.
_FEWEST: Final = 4096
#: Seconds of measurements after which a process begins no more.
_BUDGET: Final = 6.0
_spent: Final = {"seconds": 0.0}
_OPERANDS: Final = ("x", "up", "up_bias", "down", "down_bias", "residual")
Values = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Site:
    """The arguments of a feed-forward block: nodes, and constants."""

    node: Node

    @property
    def operands(self) -> tuple[Node | None, ...]:
        given = arguments(self.node)
        return tuple(given[name] for name in _OPERANDS)

    @property
    def activation(self) -> str:
        return str(arguments(self.node)["activation"])

    @property
    def values(self) -> Values:
        """Their fake tensors."""
        x, up, up_bias, down, down_bias, residual = (None if n is None else tensor(n) for n in self.operands)
        assert x is not None and up is not None and down is not None
        return x, up, up_bias, down, down_bias, residual

    @property
    def problem(self) -> Problem:
        return problem_of(*self.values, self.activation)


def candidates(site: Node, training: bool) -> tuple[list[Candidate], dict[str, str]]:
    """The ways to run ``site``, best guess first and the plain meaning last; and why others can't."""
    found = _Site(site)
    plain = Candidate(PLAIN, "aten", overload("mlp"))
    reasons = _objections(found, training)
    if reasons:
        return [plain], {"triton": reasons[0]}
    target = torch.ops.fxopt.mlp_forward.default
    fixed = (*found.operands, found.activation)
    listed = configs(found.problem, _architecture(found.values[0].device))
    return [*(Candidate(f"triton-{c}", "triton", target, arguments=(*fixed, c)) for c in listed), plain], {}


def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _objections(site: _Site, training: bool) -> list[str]:
    """Why no generated kernel can serve, the most telling reason first."""
    x, residual = site.values[0], site.values[-1]
    checks = (
        None if x.device.type == "cuda" else f"Triton kernels run on CUDA devices, not on {x.device.type}",
        None if find_spec("triton") else "triton is not installed",
        "there will be a backward, which needs the hidden elements" if training else None,
        objection(site.problem) or operands_objection(*site.values),
        rows_objection(x) and f"x: {rows_objection(x)}",
        None if residual is None else rows_objection(residual) and f"residual: {rows_objection(residual)}",
        "an operand is empty" if any(size == 0 for size in x.shape if isinstance(size, int)) else None,
    )
    return [reason for reason in checks if reason]


def choose(
    site: Node, training: bool, lower: str, strict: bool = False, base: Base | None = None
) -> tuple[Candidate, Decision]:
    """The candidate to run ``site``: forced by ``lower="triton"`` or ``"aten"``, or what measures as the fastest.

    Args:
        site: a call of the operator.
        training: whether there will be a backward.
        lower: the option of that name; ``"sdpa"`` is about attention and leaves a block as it is.
        strict: raise where what was forced can't serve.
        base: how the rest of the graph is compiled.
    """
    found, refused = candidates(site, training)
    if lower in ("triton", "aten"):
        return forced(site, found, refused, lower, strict)
    reason = f"lower={lower!r} is about attention" if lower != "auto" else None
    if reason is None and len(found) == 1:
        reason = f"the only one that can serve (triton: {refused['triton']})"
    reason = reason or _unmeasured(_Site(site))
    if reason is not None:
        return found[-1], Decision((site.name,), PLAIN, reason)
    base = base or Base()
    measure = partial(_measure, _Site(site), found, base)
    terms = Terms("feed-forward blocks", _spent, _BUDGET)
    return decide(site.name, _key(_Site(site), found, base), found, measure, terms)


def _unmeasured(site: _Site) -> str | None:
    """Why nothing is measured, as a sentence, or ``None`` where something is."""
    x = site.values[0]
    sizes = [size for value in site.values if value is not None for size in (*value.shape, *value.stride())]
    if not all(map(has_hint, sizes)):
        return "not measured: the sizes are not known"
    rows = _rows(x)
    if rows < _FEWEST:
        return f"not measured: {rows} rows; with fewer than {_FEWEST} there is little to gain"
    reason = residual_objection(site.node)
    return reason and f"not measured: {reason}"


def _rows(x: Tensor) -> int:
    return math.prod(hint(size) for size in x.shape[:-1])


@dataclass(frozen=True)
class _Probe:
    """One block and real operands, as a program of its own; what reads its result stands for all that may."""

    operands: Values
    activation: str
    around: Followers

    def launches(self, name: str) -> tuple[Callable[[], Any], ...]:
        """A call of the generated kernel ``triton-<config>`` alone."""
        return (partial(self._generated(name), *self.operands),)

    def calls(self, name: str, base: Base) -> tuple[Callable[[], Any], ...]:
        """What to time of a candidate, ``aten`` or ``triton-<config>``."""
        block = self._plain if name == PLAIN else self._generated(name)
        fused = self.around.fused and self.operands[-1] is not None
        if name != PLAIN and not fused:
            return self.launches(name)
        given = [x for x in self.operands if x is not None]

        def whole(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            out = block(*(None if x is None else next(rest) for x in self.operands))
            return [*([out] if self.around.kept or not fused else []), *([out.relu()] if fused else [])]

        return (base.compile(whole, given),)

    def _plain(self, *operands: Any) -> Tensor:
        x, up, up_bias, down, down_bias, residual = operands
        return reference.mlp(x, up, up_bias, down, down_bias, residual, self.activation)

    def _generated(self, name: str) -> Callable[..., Tensor]:
        config = name.removeprefix("triton-")

        def forward(*operands: Tensor | None) -> Tensor:
            out: Tensor = torch.ops.fxopt.mlp_forward_launch(*operands, self.activation, config)
            return out

        return forward


def _measure(site: _Site, found: Sequence[Candidate], base: Base, failed: dict[str, str]) -> dict[str, float]:
    """Median seconds of each candidate; one that fails is left out, and put among ``failed``."""
    x, up, up_bias, down, down_bias, residual = (
        None if value is None else materialise(value, *layout(value), seed) for seed, value in enumerate(site.values)
    )
    assert x is not None and up is not None and down is not None
    operands = (x, up, up_bias, down, down_bias, x if site.operands[-1] is site.operands[0] else residual)
    probe = _Probe(operands, site.activation, followers(site.node))
    names = [candidate.name for candidate in found if candidate.name != PLAIN]
    with torch.no_grad():
        if x.is_cuda:
            compile_together([launch for name in names for launch in probe.launches(name)])
        return measured(names, probe.launches, partial(probe.calls, base=base), x.device, failed)


def _key(site: _Site, found: Sequence[Candidate], base: Base) -> str:
    x, up, _, down, *_ = site.values
    facts = [
        f"mlp {site.problem}",
        f"rows<={1 << max(_rows(x) - 1, 0).bit_length()}",
        f"weights {[layout(weight)[1] for weight in (up, down)]}",
        f"{followers(site.node)} {site.operands[-1] is site.operands[0]}",
        f"base {base}",
        *(candidate.name for candidate in found),
    ]
    return "\n".join([*facts, fingerprint(x.device)])
