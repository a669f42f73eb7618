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

    def named(self, condition: Expr) -> Expr:
        """A condition with names for the extremes that it reads."""
        named = {name: Expr("symbol", value=text) for name, text in self._names.items()}
        return condition.replace(lambda e: named.get(str(e), e))

    @property
    def legend(self) -> str:
        """What the extremes are of."""
        return "".join(f"; low{n}, high{n} of {row} over the rows" for n, row in enumerate(self.possible.rows))

    @property
    def _names(self) -> dict[str, str]:
        return self.possible.names(len(self.spec.captures))
