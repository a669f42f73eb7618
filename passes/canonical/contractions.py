"""Every product of two tensors over one axis becomes ``matmul``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.ir.nodes import shape
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Const, Match, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten


@dataclass(frozen=True)
class _Einsum:
    """A two-operand einsum as permutations around one matmul."""

    left: Node
    right: Node
    left_order: tuple[int, ...]
    right_order: tuple[int, ...]
    result_order: tuple[int, ...]


def _two_operands(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, Node) for v in value)


def _read_einsum(match: Match) -> _Einsum | Rejection:
    left, right = match["operands"]
    letters = _expand_equation(match["equation"], len(shape(left)), len(shape(right)))
    if letters is None:
        return Rejection(f"{match['equation']!r} is not an einsum of two operands with distinct indices")
    a, b, out = letters
    batch = [x for x in out if x in a and x in b]
    summed = [x for x in a if x in b and x not in out]
    rows = [x for x in a if x not in b]
    columns = [x for x in b if x not in a]
    if rows and columns and set(rows + columns) <= set(out) and out.index(columns[0]) < out.index(rows[0]):
        # The operand whose index comes first in the result is the left one: its rows are then not permuted.
        left, right, a, b, rows, columns = right, left, b, a, columns, rows
    if len(summed) != 1 or len(rows) != 1 or len(columns) != 1 or not set(rows + columns) <= set(out):
        return Rejection(f"{match['equation']!r} is not one row index times one column index over one summed index")
    result = batch + rows + columns
    return _Einsum(
        left,
        right,
        tuple(a.index(x) for x in batch + rows + summed),
        tuple(b.index(x) for x in batch + summed + columns),
        tuple(result.index(x) for x in out),
    )


def _expand_equation(equation: str, left_rank: int, right_rank: int) -> tuple[list[str], list[str], list[str]] | None:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not comma or "," in right:
        return None
    spelled = [_spell(left, left_rank), _spell(right, right_rank)]
    if not arrow:
        letters = [x for x in left + right if x.isalpha()]
        implicit = "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
        output = ("..." if "..." in inputs else "") + implicit
    longest = max((operand for operand in spelled), key=lambda s: sum(x.isdecimal() for x in s))
    dots = [x for x in longest if x.isdecimal()]
    spelled.append([y for x in output.replace("...", ".") for y in (dots if x == "." else [x])])
    return None if any(len(set(s)) != len(s) for s in spelled) else (spelled[0], spelled[1], spelled[2])


def _spell(term: str, rank: int) -> list[str]:
    """The indices of one operand, an ellipsis spelled out as digits counted from the right."""
    count = rank - len(term.replace("...", ""))
    dots = [str(i) for i in reversed(range(count))]
    return [y for x in term.replace("...", ".") for y in (dots if x == "." else [x])]


def _permute(builder: Builder, node: Node, order: tuple[int, ...]) -> Node:
    if order == tuple(range(len(order))):
        return node
    swapped = (*range(len(order) - 2), len(order) - 1, len(order) - 2)
    if order == swapped:
        return builder.transpose(node)
    return builder.call(aten.permute.default, node, list(order))


def _write_einsum(builder: Builder, einsum: _Einsum) -> Node:
    left = _permute(builder, einsum.left, einsum.left_order)
    right = _permute(builder, einsum.right, einsum.right_order)
    return _permute(builder, builder.call(aten.matmul.default, left, right), einsum.result_order)


def _write_baddbmm(builder: Builder, match: Match) -> Node:
    product = builder.call(aten.matmul.default, match["a"], match["b"])
    if match["alpha"] != 1:
        product = builder.call(aten.mul.Tensor, product, match["alpha"])
    if match["beta"] == 0:
        return product
    bias = match["bias"]
    if match["beta"] != 1:
        bias = builder.call(aten.mul.Tensor, bias, match["beta"])
    return builder.call(aten.add.Tensor, product, bias)


def _weight_is_computed(match: Match) -> Match | Rejection:
    weight = match["weight"]
    if weight.op in ("placeholder", "get_attr"):
        return Rejection("the second operand is a stored weight: it is a linear layer", (weight,))
    return match


RULES = (
    Rule(
        name="batched-product",
        patterns={
            "bmm": Op(aten.bmm.default, Var("a"), Var("b")),
            "mm": Op(aten.mm.default, Var("a"), Var("b")),
        },
        rewrite=lambda builder, match: builder.call(aten.matmul.default, match["a"], match["b"]),
    ),
    Rule(
        name="product-plus-bias",
        patterns={
            "baddbmm": Op(
                aten.baddbmm.default, Var("bias"), Var("a"), Var("b"), beta=Const("beta"), alpha=Const("alpha")
            ),
        },
        rewrite=_write_baddbmm,
    ),
    Rule(
        name="einsum",
        patterns={
            "two operands": Op(
                aten.einsum.default, Const("equation"), Const("operands", _two_operands), path=Const("path")
            ),
        },
        check=_read_einsum,
        rewrite=_write_einsum,
    ),
    Rule(
        name="linear-of-activations",
        patterns={"linear": Op(aten.linear.default, Var("x"), Var("weight"))},
        check=_weight_is_computed,
        rewrite=lambda builder, match: builder.call(
            aten.matmul.default, match["x"], builder.transpose(match["weight"])
        ),
    ),
)


@register_pass
@dataclass(frozen=True)
class Contractions:
    """``bmm``, ``mm``, ``baddbmm``, two-operand ``einsum`` and ``linear`` of two activations ``-> matmul``.

    ``baddbmm(m, a, b, β, α) -> α·(a @ b) + β·m``. An einsum becomes permutations around one matmul; it must have one
    summed index, one row and one column index. A linear layer with a stored weight stays.
    """

    name: ClassVar[str] = "contractions"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("synonyms",)

    def run(self, program: Program) -> PassResult:
        """Rewrite them."""
        return apply_rules(program, RULES)
