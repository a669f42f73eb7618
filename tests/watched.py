"""A compiled program whose report is kept, so that one compilation tells of the rewriting and of the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxopt.backend import collecting
from fxopt.report.report import Report


class Watched(nn.Module):
    """A module, compiled with the backend ``fxopt`` at its first call.

    Attributes:
        report: of what the first call compiled, as `fxopt.explain` makes it.
    """

    def __init__(self, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self.report: Report | None = None
        self._orig_mod = compiled  # parameters have the names that they have in a compiled module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with collecting() as (outcomes, failures):
            result = self._orig_mod(*args, **kwargs)
        if self.report is None:
            assert not failures, failures
            self.report = Report.merge([outcome.report for outcome in outcomes])
        return result
