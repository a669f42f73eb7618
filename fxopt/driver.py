"""The driver: program in, rewritten and lowered program and its report out. Every entry point goes through here."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Final

from fxopt.errors import OptionError
from fxopt.ir.decision import Decision
from fxopt.ir.program import Program
from fxopt.lowering.lower import lower
from fxopt.lowering.options import Options
from fxopt.lowering.postponed import STAND_IN, Postponed
from fxopt.lowering.probe import Base
from fxopt.passes import exact_pipeline
from fxopt.report.report import Report
from fxopt.rewriter.passes import Pass
from fxopt.rewriter.pipeline import Observer, PassRecord, PipelineResult, run_pipeline
from fxopt.rewriter.registry import resolve_pass
from fxopt.verify import verify_numerically


@dataclass
class Outcome:
    """Everything that became of one captured program."""

    captured: Program
    result: PipelineResult
    lowered: Program
    decisions: tuple[Decision, ...]
    steps: list[tuple[PassRecord, Program]] = field(default_factory=list)
    postponed: Postponed | None = None

    @property
    def report(self) -> Report:
        """What was done, for people and machines."""
        return Report.of(self.result, self.decisions)


@dataclass
class _Pauses:
    """The pauses of Python's collector that have begun and not ended, of all threads; whether it ran before them."""

    lock: Lock = field(default_factory=Lock)
    depth: int = 0
    enabled: bool = True


_PAUSES: Final = _Pauses()


@contextmanager
def garbage_waits() -> Iterator[None]:
    """Python's collector of cycles pauses inside the block: graphs are cycles, and still needed.

    It would look through all of them again and again, for a tenth to a quarter of the time and without finding any.
    """
    with _PAUSES.lock:
        if not _PAUSES.depth:
            _PAUSES.enabled = gc.isenabled()
            gc.disable()
        _PAUSES.depth += 1
    try:
        yield
    finally:
        with _PAUSES.lock:
            _PAUSES.depth -= 1
            if not _PAUSES.depth and _PAUSES.enabled:
                gc.enable()


def selected_passes(options: Options) -> tuple[Pass, ...]:
    """The passes to run: the exact pipeline, or those the user names, with what each requires before it."""
    if options.passes is None:
        return exact_pipeline()
    chosen: list[Pass] = []
    for wanted in options.passes:
        _append(chosen, _of_a_graph(resolve_pass(wanted)))
    return tuple(chosen)


def _of_a_graph(chosen: Pass) -> Pass:
    if chosen.tier == "trainable":
        raise OptionError(f"{chosen.name} is a trainable pass: give it to fxopt.prepare, train, then fxopt.convert")
    return chosen


def _append(chosen: list[Pass], current: Pass, depth: int = 0) -> None:
    if depth > 20:
        raise OptionError(f"pass {current.name} requires itself")
    names = {p.name for p in chosen}
    for required in current.requires:
        if required not in names:
            _append(chosen, resolve_pass(required), depth + 1)
    if current.name not in {p.name for p in chosen}:
        chosen.append(current)


def rewrite(program: Program, options: Options, observe: Observer | None = None) -> PipelineResult:
    """Run the passes that ``options`` select, and verify what they rewrote as far as ``options`` ask for."""
    import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning before a pass makes one

    passes, strict = selected_passes(options), options.strict
    if options.verify == "numeric":
        return run_pipeline(program, passes, strict=strict, observe=observe, check=verify_numerically)
    with garbage_waits():
        return run_pipeline(program, passes, strict=strict, observe=observe)


def run(program: Program, options: Options, *, training: bool, mode: str | None = None, wait: bool = False) -> Outcome:
    """Run the pipeline on ``program`` and lower the result; ``mode`` is torch.compile's.

    With ``wait``, decisions that may come after the base compiler's work do: `settle` makes them.
    """
    steps: list[tuple[PassRecord, Program]] = []
    result = rewrite(program, options, lambda before, after, record: steps.append((record, after)))
    postponed = Postponed(result.program) if wait and options.lower == "auto" and not training else None
    outcome = Outcome(program, result, result.program, (), steps, postponed)
    return _lowered(outcome, options, training, mode)


def settle(outcome: Outcome, options: Options, mode: str | None = None) -> Outcome:
    """``outcome`` with every decision made, and lowered anew where one did not turn out as the graph has it."""
    if outcome.postponed is None:
        return outcome
    found = outcome.postponed.finish()
    if None in found.values():
        return replace(_lowered(outcome, options, False, mode), postponed=None)
    waiting = (decision.nodes[0] if decision.chosen == STAND_IN else "" for decision in outcome.decisions)
    decisions = (found.get(name) or decision for name, decision in zip(waiting, outcome.decisions, strict=True))
    return replace(outcome, decisions=tuple(decisions), postponed=None)


def _lowered(outcome: Outcome, options: Options, training: bool, mode: str | None) -> Outcome:
    lowered, decisions = lower(
        outcome.result.program,
        training=training,
        option=options.lower,
        strict=options.strict,
        base=Base(options, mode),
        postponed=outcome.postponed,
    )
    return replace(outcome, lowered=lowered, decisions=decisions)
