"""The text of what captured vectors tell of keys that a block of rows keeps (`fxopt.codegen.attention.possible`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.possible import Possible
from fxopt.codegen.printing import emit
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, Kind

#: The least and the greatest value over rows are integers.
_EXTREME: Final[Kind] = "int"


@dataclass(frozen=True, slots=True)
class PossibleText:
    """What ``possible`` asks of keys, where ``low0`` and ``high0`` are the extremes of its first expression of rows."""

    spec: AttentionSpec
    possible: Possible

    @property
    def extremes(self) -> list[str]:
        """The lines that compute the least and the greatest value of each expression over the rows ``i``."""
        texts = [self.emit(row) for row in self.possible.rows]
        return [f"low{n}, high{n} = tl.min({text}), tl.max({text})" for n, text in enumerate(texts)]

    def emit(self, expr: Expr) -> str:
        """A condition, or an expression of rows, as text."""
        extremes = (_EXTREME,) * len(self._names)
        return emit(expr, self._names, (*self.spec.capture_kinds, *extremes))

    @property
    def maths(self) -> str:
        """All that it tells."""
        known = (("sure", self.possible.sure), ("all rows keep any", self.possible.whole))
        further = "".join(f"; {what}: {self._named(expr)}" for what, expr in known if expr is not None)
        extremes = (f"; low{n}, high{n} of {row} over the rows" for n, row in enumerate(self.possible.rows))
        return f"Possible: {self._named(self.possible.condition)}{further}{''.join(extremes)}."

    def _named(self, condition: Expr) -> Expr:
        named = {name: Expr("symbol", value=text) for name, text in self._names.items()}
        return condition.replace(lambda e: named.get(str(e), e))

    @property
    def _names(self) -> dict[str, str]:
        return self.possible.names(len(self.spec.captures))


def power_of(rows: int) -> int:
    """The least power of two that is not below ``rows``: how many a range of them must have."""
    return 1 << (rows - 1).bit_length()
