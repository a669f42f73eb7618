"""What proofs remember is told apart by the kinds of constants and captures; expressions share what does not change."""

from __future__ import annotations

from fxopt.analysis.domain import Domain
from fxopt.analysis.logic import Logic
from fxopt.ir.expression import Expr, I, J, call, capture, const, parse, symbol


def test_equal_constants_of_different_kinds_are_simplified_each_on_its_own() -> None:
    logic = Logic(Domain(1, 1, 8, 8))
    assert call("lt", J, const(1)) == call("lt", J, const(1.0))
    assert str(logic.simplify(call("lt", J, const(1)))) == "(j <= 0)"
    assert str(logic.simplify(call("lt", J, const(1.0)))) == "(j < 1.0)"
    assert str(logic.simplify(call("lt", J, const(1)))) == "(j <= 0)"


def test_a_condition_and_its_negation_are_told_apart() -> None:
    logic, causal = Logic(Domain(1, 1, 8, 8)), parse("j <= i")
    assert str(logic.simplify(causal)) == "(j <= i)"
    assert str(logic.simplify(causal, negated=True)) == "(j >= (i + 1))"


def test_captures_of_other_kinds_are_simplified_anew() -> None:
    logic, condition = Logic(Domain(1, 1, 8, 8), ("float",)), parse("c0 < 1")
    assert str(logic.simplify(condition)) == "(c0 < 1)"
    logic.captures = ("int",)
    assert str(logic.simplify(condition)) == "(c0 <= 0)"
    logic.captures = ("float",)
    assert str(logic.simplify(condition)) == "(c0 < 1)"


def test_rows_keep_a_key_whatever_was_asked_before() -> None:
    logic = Logic(Domain(1, 1, 8, 8))
    for _ in range(2):
        assert logic.every_row_keeps_a_key(parse("j <= i"))
        assert not logic.every_row_keeps_a_key(parse("j < i"))
        assert not logic.every_row_keeps_a_key(parse("c0 < 1"))
        assert logic.every_row_keeps_a_key(const(True))


def test_no_key_is_a_witness_where_there_may_be_none() -> None:
    assert not Logic(Domain(1, 1, 8, 0)).every_row_keeps_a_key(const(True))


def test_a_symbol_is_put_in_only_where_it_stands() -> None:
    expr = parse("where(j <= i, s * 0.5, c0 + h)")
    assert expr.leaves == {symbol(n) for n in "jish"} | {capture(0)}
    changed = expr.put(J, const(3))
    assert str(changed) == "where((3 <= i), (s * 0.5), (c0 + h))"
    assert changed.args[1] is expr.args[1]
    assert expr.put(symbol("b"), const(0)) is expr
    assert J not in changed.leaves


def test_a_shared_part_is_changed_once() -> None:
    part = call("add", I, J)
    seen: list[Expr] = []

    def change(expr: Expr) -> Expr:
        seen.append(expr)
        return const(2) if expr == I else expr

    assert str(call("mul", part, part).replace(change)) == "((2 + j) * (2 + j))"
    assert len(seen) == 4


def test_text_and_hash_are_those_of_an_equal_expression() -> None:
    one, other = parse("where(j <= i, s, -inf)"), parse("where(j <= i, s, -inf)")
    assert one == other and hash(one) == hash(other) and str(one) == str(other)
    assert one != parse("where(j <= i, s, inf)")
    assert one != str(one)
