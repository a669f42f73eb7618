"""The figures that fxopt's attention is to reach, as data, and whether a result reaches them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from benchmarks.attention_cases import Case
from benchmarks.attention_results import Result, Verdict

_BASELINE: Final = ("base ",)
_SDPA: Final = ("sdpa-",)
_FLEX: Final = ("flex",)
_ANY: Final = ("sdpa-", "flex")
_BASICS: Final = ("plain", "causal")


@dataclass(frozen=True)
class Goal:
    """fxopt is to be ``ratio`` times as fast as the fastest of ``against``.

    Attributes:
        group: the group of cases that it is about.
        ratio: rate of fxopt's fastest candidate over that of the fastest one that it is compared with; 0 only compares.
        against: how the names of those begin.
        words: the goal in short.
        kinds: the kinds that it is about; empty for all of the group.
        widths: the head dimensions that it is about; empty for all.
        shortest: the smallest number of keys.
    """

    group: str
    ratio: float
    against: tuple[str, ...]
    words: str
    kinds: Collection[str] = ()
    widths: Collection[int] = ()
    shortest: int = 0

    def concerns(self, case: Case) -> bool:
        """Whether the goal is about ``case``."""
        return (
            case.group == self.group
            and (not self.kinds or case.kind.name in self.kinds)
            and (not self.widths or case.sizes.width in self.widths)
            and case.sizes.keys >= self.shortest
        )


GOALS: Final = (
    Goal("forward", 1.0, _SDPA, "1.00x the best of SDPA", _BASICS, (128,), 2048),
    Goal("forward", 1.0, ("sdpa-cudnn",), "1.00x cuDNN", ("plain",), (64,), 2048),
    Goal("modified", 1.3, _FLEX, "1.30x FlexAttention", (), (64, 128)),
    Goal("modified", 0.9, _BASELINE, "0.90x own plain per computed FLOP", (), (64, 128)),
    Goal("holes", 1.0, _FLEX, "1.00x FlexAttention"),
    Goal("short", 1.2, _ANY, "1.20x the best peer"),
    Goal("windows", 2.0, _ANY, "2.00x the best peer"),
    Goal("backward", 1.0, _SDPA, "1.00x the best of SDPA", _BASICS, (128,)),
    Goal("backward", 1.4, _FLEX, "1.40x FlexAttention", ("softcap", "relative-bias", "alibi")),
    Goal("decode", 0.85, _BASELINE, "0.85x the copy bandwidth"),
    Goal("padded", 1.8, ("base unaware",), "1.80x the same batch without padding awareness"),
    Goal("padded", 0.0, ("base full-",), "(the same batch without padding)"),
)


def judge(case: Case, result: Result, goals: Collection[Goal] = GOALS) -> None:
    """Add a verdict for every goal that is about ``case``; one against the best peer where there is none."""
    concerned = [goal for goal in goals if goal.concerns(case)] or [Goal(case.group, 0.0, _ANY, "")]
    result.verdicts = [_verdict(goal, result) for goal in concerned]


def _verdict(goal: Goal, result: Result) -> Verdict:
    own, other = result.fastest(("fxopt",)), result.fastest(goal.against)
    if own is None or other is None:
        return Verdict(goal.words, goal.ratio, own, other, None)
    return Verdict(goal.words, goal.ratio, own, other, result.rate(own) / result.rate(other))
