"""Rules that replace more than the root of their match: all or nothing, listed, and verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fxopt import driver
from fxopt.errors import PassError
from fxopt.frontend.export import from_export
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.lowering.options import Options
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Match, Op, Var
from fxopt.rewriter.pipeline import run_pipeline
from fxopt.rewriter.rule import Rule

aten = torch.ops.aten
Reading = Callable[[Builder, Node], Node]


def two_readers(x: Tensor) -> tuple[Tensor, Tensor]:
    e = x.exp()
    early = e.abs().sum(-1)
    return e.log() + early[:, None], early


@dataclass(frozen=True)
class Unread:
    """``log(exp(x)) -> x``, and ``|exp(x)|``, which stands before the logarithm, as ``reading`` has it."""

    reading: Reading
    name: ClassVar[str] = "unread"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        inner = Op(aten.exp.default, Var("x"), name="e")
        return apply_rules(
            program, (Rule("unread", {"log of exp": Op(aten.log.default, inner)}, self.write, kind="mlp"),)
        )

    def write(self, builder: Builder, match: Match) -> Node:
        (other,) = (user for user in match["e"].users if user.target is aten.abs.default)
        with builder.before(match["e"]):
            builder.also(other, self.reading(builder, match["x"]), "sizes")
        return builder.call(aten.alias.default, match["x"])


def right(builder: Builder, x: Node) -> Node:
    return builder.call(aten.exp.default, x)


def wrong(builder: Builder, x: Node) -> Node:
    return builder.call(aten.expm1.default, x)


def of_another_shape(builder: Builder, x: Node) -> Node:
    return builder.call(aten.sum.dim_IntList, right(builder, x), [0])


def program() -> Program:
    return from_export(two_readers, (torch.randn(2, 3),))


def test_every_output_is_replaced_and_named() -> None:
    before = program()
    result = run_pipeline(before, [Unread(right)], strict=True)
    assert result.program.operators() == {
        "aten.exp": 1, "aten.alias": 1, "aten.sum": 1, "aten.add": 1, "aten.unsqueeze": 1,
    }  # fmt: skip
    (replacement,) = result.replacements
    assert [old for old, _ in replacement.outputs] == ["log", "abs_1"]
    assert replacement.site.reason == "log of exp -> aten.alias (out, sizes)"
    x = torch.rand(2, 3)
    for found, expected in zip(result.program.module(x), two_readers(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_is_replaced_where_one_output_does_not_fit() -> None:
    before = program()
    result = run_pipeline(before, [Unread(of_another_shape)], strict=True)
    assert result.program.operators() == before.operators()
    assert any("would have shape" in miss.reason for miss in result.near_misses)


def test_numeric_verification_looks_at_every_output() -> None:
    options = Options(passes=(Unread(right),), verify="numeric", strict=True)
    assert driver.rewrite(program(), options).replacements
    with pytest.raises(PassError, match=r"rule unread at .*leaves the error budget"):
        driver.rewrite(program(), Options(passes=(Unread(wrong),), verify="numeric", strict=True))
