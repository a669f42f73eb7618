"""How every case of the matrices is tested: what the report says of it, and its numbers against float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from fxopt.testing import DISTINCT, SIZE_COLLISIONS, Evaluation, assert_within_budget, evaluate, oracle_gradients
from tests.attention.case import Args, Case, Mode
from tests.watched import Watched

SEED: Final = 11
_SHORT: Final = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One case under one set of conditions; ``shapes`` is "static", "dynamic", or the name of a size collision."""

    case: Case
    mode: Mode
    shapes: str
    dtype: torch.dtype

    @property
    def key(self) -> tuple[str, ...]:
        """Its row in the golden table."""
        return (self.case.number, self.case.name, self.mode, self.shapes, _SHORT[self.dtype])

    @property
    def dynamic(self) -> bool:
        """Whether the program is compiled for any sizes."""
        return self.shapes == "dynamic"

    def build(self) -> tuple[nn.Module, Args, Args | None]:
        """The module, its arguments, and the second arguments if the case has some."""
        conditions = (SIZE_COLLISIONS.get(self.shapes, DISTINCT), self.dtype, self.mode)
        return *self.case.build(*conditions), self.case.others(*conditions)

    def __str__(self) -> str:
        return "-".join((self.case.number, self.mode, self.shapes, _SHORT[self.dtype]))


def runs(cases: Iterable[Case], conditions: Callable[[int], Iterable[tuple[Mode, str, torch.dtype]]]) -> list[Run]:
    """The runs of each case under ``conditions(position)``, moved into the modes and dtypes in which it can run."""
    planned: dict[tuple[str, ...], Run] = {}
    for position, case in enumerate(cases):
        for mode, shapes, dtype in conditions(position):
            allowed_mode = mode if mode in case.modes else case.modes[0]
            allowed_dtype = dtype if dtype in case.dtypes else case.dtypes[0]
            run = Run(case, allowed_mode, shapes, allowed_dtype)
            planned[run.key] = run
    return list(planned.values())


def compiled(module: nn.Module, dynamic: bool) -> Callable[..., Any]:
    """``module`` through the backend; the rewritten graph itself runs eagerly, so no time goes to Inductor."""
    return torch.compile(module, backend="fxopt", dynamic=dynamic, options={"base": "eager"})


def check_compiled(run: Run) -> list[Any]:
    """Check the numbers of the run through the backend, gradients included; the attention sites that it reports."""
    programs: list[Watched] = []

    def watched(module: nn.Module, _: Args) -> Watched:
        programs.append(Watched(compiled(module, run.dynamic)))
        return programs[-1]

    check_numbers(run, watched)
    report = programs[0].report
    assert report is not None
    sites = [site for site in report.sites if site.kind == "attention"]
    for status in ("rewritten", "kept"):
        assert report.count("attention", status) == sum(site.status == status for site in sites)
    return sites


def check_status(case: Case, sites: list[Any]) -> None:
    """Assert that the sites are as the case expects, and that what was kept says why and where."""
    rewritten, kept = ([site for site in sites if site.status == status] for status in ("rewritten", "kept"))
    assert len(rewritten) + len(kept) == len(sites)
    reasons = [f"{site.reason} ({site.source})" for site in kept]
    if case.expected == "rewritten":
        assert len(rewritten) == case.sites and not kept, f"{len(rewritten)} rewritten, kept: {reasons}"
    if case.expected == "kept":
        assert not rewritten, f"rewritten by {[site.rule for site in rewritten]}"
        assert len(kept) >= case.sites, f"{len(kept)} sites listed, not {case.sites}"
        assert not case.sites or any(re.search(case.why, site.reason) for site in kept), reasons
    if case.expected == "either":
        assert sites, "an attention must be rewritten or listed, not passed over"
    for site in kept:
        assert site.reason and re.search(r"\w\.py", str(site.source)), "what is kept must say why, and where"


def summary(sites: list[Any]) -> str:
    """The statuses as the golden table holds them: ``rewritten``, ``kept``, ``rewritten 2``, ``kept 1 rewritten 1``."""
    counts = {status: sum(site.status == status for site in sites) for status in ("kept", "rewritten")}
    present = {status: count for status, count in counts.items() if count}
    if list(present.values()) == [1]:
        return next(iter(present))
    return " ".join(f"{status} {count}" for status, count in present.items()) or "none"


def check_numbers(run: Run, make: Callable[[nn.Module, Args], Callable[..., Any]]) -> None:
    """Assert that what ``make(module, args)`` returns computes the module within the budget, gradients included."""
    torch._dynamo.reset()
    module, args, others = run.build()
    with _gradients(run):
        program = make(module, args)
        for given in filter(None, (args, others)):
            eager, reference = _seeded(evaluate, module, given), _seeded(oracle_gradients, module, given)
            actual = _seeded(evaluate, program, given)
            assert_within_budget(actual, eager, reference, floor=_floor(run))


def _seeded(how: Callable[..., Evaluation], program: Callable[..., Any], args: Args) -> Evaluation:
    torch.manual_seed(SEED)
    return how(program, *args)


def _gradients(run: Run) -> AbstractContextManager[Any]:
    return nullcontext() if run.mode == "training" else torch.no_grad()


def _floor(run: Run) -> float:
    """A softmax over one key is constant: its gradients vanish by cancelling sums of D terms of size one.

    In float64 the oracle is the program itself, so that eager's error is 0: sums of D terms are allowed to differ. How
    eager sums gradients in float32 depends on the processor: these are sums of terms of size one too.
    """
    sizes = SIZE_COLLISIONS.get(run.shapes, DISTINCT)
    if 1 in vars(sizes).values() or run.dtype is torch.float64:
        return float(sizes.D)
    return 1.0 if run.mode == "training" and run.dtype is torch.float32 else 0.0
