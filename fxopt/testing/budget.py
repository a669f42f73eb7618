"""How far a rewritten program may be from float64: a small multiple of what the eager program itself is.

With ``R`` the float64 reference, ``E`` the eager result and ``X`` the rewritten one, both in the program's own dtype
with unit round-off ``u``, ``err(·) = |· − R|`` and ``s = max|R|``, a rewrite that only reassociates satisfies

    max err(X) ≤ 2·max err(E) + u·s     and     mean err(X) ≤ 2·mean err(E) + u·s

on every output and every gradient. ``u·s`` keeps a lucky eager run (``err(E) = 0``) from failing an honest rewrite.
NaN and infinities must stand at the same places with the same sign; integers, booleans, shapes, dtypes and devices
must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from fxopt.testing.evaluation import Evaluation

#: Unit round-off (half the spacing of numbers at 1) of each floating dtype.
UNIT_ROUNDOFF: Final[dict[torch.dtype, float]] = {
    torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53,
    torch.complex64: 2.0**-24, torch.complex128: 2.0**-53,
}  # fmt: skip
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class ErrorReport:
    """The comparison of one output or gradient.

    Attributes:
        name: where it stands, e.g. ``outputs[0]`` or ``gradients['args[1]']``.
        eager: largest error of the eager result against float64.
        rewritten: largest error of the rewritten result against float64.
        budget: what ``rewritten`` may be at most.
        eager_mean: mean error of the eager result.
        rewritten_mean: mean error of the rewritten result.
        mean_budget: what ``rewritten_mean`` may be at most.
        problems: what is wrong, one sentence each; empty if nothing is.
    """

    name: str
    eager: float = 0.0
    rewritten: float = 0.0
    budget: float = 0.0
    eager_mean: float = 0.0
    rewritten_mean: float = 0.0
    mean_budget: float = 0.0
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if the rewritten result is within the budget and of the right form."""
        return not self.problems

    @property
    def ratio(self) -> float:
        """The rewritten program's largest error over the eager one's; 0 if both are exact, inf if only eager is."""
        if self.eager > 0:
            return self.rewritten / self.eager
        return 0.0 if self.rewritten == 0 else math.inf

    @property
    def used(self) -> float:
        """The larger of the two fractions of the budget that were used; at most 1 within the budget."""
        pairs = ((self.rewritten, self.budget), (self.rewritten_mean, self.mean_budget))
        return max(error / budget if budget > 0 else (0.0 if error == 0 else math.inf) for error, budget in pairs)

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "; ".join(self.problems)
        return (
            f"{self.name}: max error {self.rewritten:.3g} (eager {self.eager:.3g}, budget {self.budget:.3g}), "
            f"mean {self.rewritten_mean:.3g} (eager {self.eager_mean:.3g}, budget {self.mean_budget:.3g}): {verdict}"
        )


def compare(
    actual: Any, eager: Any, reference: Any, *, floor: float = 0.0, precision: torch.dtype | None = None
) -> tuple[ErrorReport, ...]:
    """Compare three nests of results, leaf by leaf.

    Args:
        actual: results of the rewritten program: tensors nested in any way, or an `Evaluation`.
        eager: results of the eager program in the same dtype.
        reference: results of the `fxopt.testing.oracle`, in float64.
        floor: smallest scale ``s`` to assume. Needed only where a result is zero by cancellation (the gradient of a
            softmax over one key), so that its own size says nothing about the size of the terms.
        precision: the coarsest dtype to which the program rounds on the way, if that is not the result's own.

    Returns:
        One report for each leaf; a leaf that one side lacks is a report with a problem.
    """
    sides = [dict(_leaves(side)) for side in (actual, eager, reference)]
    names = list(dict.fromkeys(name for side in sides for name in side))
    return tuple(_compare_named(name, sides, floor, precision) for name in names)


def assert_within_budget(
    actual: Any, eager: Any, reference: Any, *, floor: float = 0.0, precision: torch.dtype | None = None
) -> tuple[ErrorReport, ...]:
    """Raise ``AssertionError`` naming every result that is off; return the reports if none is. See `compare`."""
    reports = compare(actual, eager, reference, floor=floor, precision=precision)
    if not reports:
        raise AssertionError("nothing to compare: neither side has a result")
    failures = [report for report in reports if not report.ok]
    if failures:
        lines = "\n  ".join(map(str, failures))
        raise AssertionError(f"{len(failures)} of {len(reports)} results left the error budget:\n  {lines}")
    return reports


def _leaves(side: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(side, Evaluation):
        side = {"outputs": side.outputs, "gradients": side.gradients}
        return ((keystr(path)[2:].replace("']", "", 1), leaf) for path, leaf in tree_flatten_with_path(side)[0])
    return ((f"outputs{keystr(path)}", leaf) for path, leaf in tree_flatten_with_path(side)[0])


def _compare_named(name: str, sides: list[dict[str, Any]], floor: float, precision: torch.dtype | None) -> ErrorReport:
    absent = [who for who, side in zip(("rewritten", "eager", "reference"), sides, strict=True) if name not in side]
    if absent:
        return ErrorReport(name, problems=(f"missing from the {' and '.join(absent)} results",))
    actual, eager, reference = (side[name] for side in sides)
    if isinstance(actual, Tensor) and isinstance(eager, Tensor) and isinstance(reference, Tensor):
        return _compare_tensors(name, actual, eager, reference, floor, precision)
    same = actual == eager if isinstance(eager, _PLAIN) else type(actual) is type(eager)
    return ErrorReport(name, problems=() if same else (f"is {actual!r} where eager gives {eager!r}",))


def _compare_tensors(
    name: str, actual: Tensor, eager: Tensor, reference: Tensor, floor: float, precision: torch.dtype | None
) -> ErrorReport:
    problems = tuple(_form_problems(actual, eager, reference))
    if problems:
        return ErrorReport(name, problems=problems)
    if not (eager.is_floating_point() or eager.is_complex()):
        differ = int((actual != eager).sum())
        return ErrorReport(name, problems=(f"{differ} of {eager.numel()} values differ from eager's",) * bool(differ))
    return _compare_floats(name, actual, eager, reference.to(eager.device), floor, precision or eager.dtype)


def _form_problems(actual: Tensor, eager: Tensor, reference: Tensor) -> Iterator[str]:
    for what in ("shape", "dtype", "device"):
        ours, theirs = getattr(actual, what), getattr(eager, what)
        if ours != theirs:
            yield f"{what} is {_shown(ours)} where eager gives {_shown(theirs)}"
    if reference.shape != eager.shape:
        yield f"the reference has shape {_shown(reference.shape)} where eager gives {_shown(eager.shape)}"


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, torch.Size) else value)


def _compare_floats(
    name: str, actual: Tensor, eager: Tensor, reference: Tensor, floor: float, precision: torch.dtype
) -> ErrorReport:
    finite = eager.isfinite() & reference.isfinite()
    problems = list(_special_value_problems(actual, eager, reference))
    x, e, r = (side.detach()[finite].to(reference.dtype) for side in (actual, eager, reference))
    if r.numel() == 0:
        return ErrorReport(name, problems=tuple(problems))
    band = UNIT_ROUNDOFF[precision] * max(float(r.abs().max()), floor)
    error_x, error_e = (x - r).abs(), (e - r).abs()
    report = ErrorReport(
        name,
        eager=float(error_e.max()),
        rewritten=float(error_x.max()),
        budget=2 * float(error_e.max()) + band,
        eager_mean=float(error_e.mean()),
        rewritten_mean=float(error_x.mean()),
        mean_budget=2 * float(error_e.mean()) + band,
    )
    if not report.rewritten <= report.budget:  # written so that a NaN fails
        problems.append(f"the largest error is {report.used:.3g} times its budget")
    if not report.rewritten_mean <= report.mean_budget:
        problems.append("the mean error is over its budget")
    return ErrorReport(**{**vars(report), "problems": tuple(problems)})


def _special_value_problems(actual: Tensor, eager: Tensor, reference: Tensor) -> Iterator[str]:
    for kind, present in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        ours, theirs = present(actual), present(eager)
        if not torch.equal(ours, theirs):
            yield f"{int((ours & ~theirs).sum())} values became {kind}, {int((theirs & ~ours).sum())} no longer are"
    infinite = torch.isinf(eager) & torch.isinf(actual)
    if not torch.equal(actual[infinite], eager[infinite]):
        yield "an infinity changed its sign"
    unreferenced = eager.isfinite() & ~reference.isfinite()
    if bool(unreferenced.any()):
        yield f"the float64 reference is not finite at {int(unreferenced.sum())} places where eager is"
