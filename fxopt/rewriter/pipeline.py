"""The pipeline: run passes one after the other, each in a transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fxopt.errors import OptionError, PassError, VerificationError
from fxopt.ir.program import Program
from fxopt.ir.verifier import verify_structure
from fxopt.rewriter.passes import NearMiss, Pass, PassResult, Replacement


@dataclass(frozen=True)
class PassRecord:
    """What happened when one pass ran: its result, or the failure for which it was rolled back, and its seconds."""

    name: str
    tier: str
    result: PassResult
    seconds: float
    failure: str = ""


@dataclass
class PipelineResult:
    """The rewritten program and the record of every pass, in order."""

    program: Program
    records: list[PassRecord] = field(default_factory=list)

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        """All rewrites that were applied."""
        return tuple(r for record in self.records for r in record.result.replacements)

    @property
    def near_misses(self) -> tuple[NearMiss, ...]:
        """All near misses that were recorded."""
        return tuple(m for record in self.records for m in record.result.near_misses)


#: Called after every pass with the program before it, the program after it, and the record.
Observer = Callable[[Program, Program, PassRecord], None]
#: A further check of a changed program against the one before; raises `VerificationError` when it fails.
Check = Callable[[Program, Program, PassResult], None]


def run_pipeline(
    program: Program,
    passes: Sequence[Pass],
    *,
    strict: bool = False,
    observe: Observer | None = None,
    check: Check | None = None,
) -> PipelineResult:
    """Run ``passes`` in order on a copy of ``program``.

    Each pass edits its own copy; the copy replaces the program only if the pass succeeded and the verifier accepts it.
    Otherwise the pass is rolled back and the failure recorded.

    Raises:
        OptionError: a pass comes before one that it requires.
        PassError: with ``strict``, the first failing pass; the message names it.
    """
    _check_order(passes)
    result = PipelineResult(program)
    candidate = program.copy()
    for current in passes:
        before = result.program
        record = _run_one(current, before, candidate, strict, check)
        if record.result.modified:
            result.program = candidate
        if record.result.modified or record.failure:
            candidate = result.program.copy()
        after = result.program
        result.records.append(record)
        if observe is not None:
            observe(before, after, record)
    return result


def _run_one(current: Pass, before: Program, candidate: Program, strict: bool, check: Check | None) -> PassRecord:
    """Run a pass on ``candidate``, a copy of ``before``, and verify what it did there."""
    start = time.perf_counter()
    failure = ""
    try:
        outcome = current.run(candidate)
        _check_outcome(outcome, current, before, candidate)
        if outcome.modified:
            verify_structure(candidate, before)
            if check is not None:
                check(before, candidate, outcome)
    except Exception as error:
        if strict:
            raise PassError(f"pass {current.name} failed: {error}") from error
        outcome, failure = PassResult(False), f"{type(error).__name__}: {error}"
    return PassRecord(current.name, current.tier, outcome, time.perf_counter() - start, failure)


def _check_outcome(outcome: object, current: Pass, before: Program, candidate: Program) -> None:
    if not isinstance(outcome, PassResult):
        raise VerificationError(f"run() gave {outcome!r}; it must give a PassResult, as apply_rules does")
    # Comparing graphs takes time, which the passes that come with fxopt, whose tests do it, need not take.
    foreign = not type(current).__module__.startswith("fxopt.passes.")
    if foreign and not outcome.modified and _text(before) != _text(candidate):
        raise VerificationError("run() changed the program and gave PassResult(modified=False); give modified=True")


def _text(program: Program) -> list[str]:
    return [f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}" for node in program.graph.nodes]


def _check_order(passes: Sequence[Pass]) -> None:
    done: set[str] = set()
    for current in passes:
        missing = [name for name in current.requires if name not in done]
        if missing:
            raise OptionError(f"pass {current.name} must come after {', '.join(missing)}")
        done.add(current.name)
