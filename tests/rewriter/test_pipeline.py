"""The pipeline: transactions, rollback, order, observers; and numeric verification of rules that are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.errors import OptionError, PassError, VerificationError
from fxopt.frontend.export import from_export
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.ir.verifier import verify_structure
from fxopt.lowering.options import Options
from fxopt.passes import Contractions, Fills, FuseAttention, Synonyms, exact_pipeline
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Op, Var
from fxopt.rewriter.pipeline import run_pipeline
from fxopt.rewriter.rule import Rule

aten = torch.ops.aten


def program() -> Program:
    return from_export(lambda x: (x.relu() + 1).tanh(), (torch.randn(2, 3),))


@dataclass(frozen=True)
class Replace:
    """Replace relu by whatever the rule writes."""

    rule: Rule
    name: ClassVar[str] = "replace"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        return apply_rules(program, (self.rule,))


RELU = {"relu": Op(aten.relu.default, Var("x"))}
TO_CLAMP = Rule("clamp", RELU, lambda builder, match: builder.call(aten.clamp.default, match["x"], 0.0), kind="mlp")
TO_ABS = Rule("abs", RELU, lambda builder, match: builder.call(aten.abs.default, match["x"]), kind="mlp")
TO_SUM = Rule("sum", RELU, lambda builder, match: builder.call(aten.sum.dim_IntList, match["x"], [0]), kind="mlp")


@dataclass(frozen=True)
class Raises:
    """Edits the graph and fails halfway."""

    name: ClassVar[str] = "raises"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        for node in program.graph.find_nodes(op="call_function", target=aten.relu.default):
            node.target = aten.abs.default
        raise RuntimeError("halfway")


@dataclass(frozen=True)
class Corrupts:
    """Leaves a graph whose metadata is not true, and says nothing."""

    name: ClassVar[str] = "corrupts"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        (node,) = program.graph.find_nodes(op="call_function", target=aten.relu.default)
        node.target = aten.sum.default
        return PassResult(True)


@dataclass(frozen=True)
class DropsOutput:
    """Changes what the program returns."""

    name: ClassVar[str] = "drops-output"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        program.graph.output_node().args = ((),)
        return PassResult(True)


def test_a_rule_replaces_and_reports() -> None:
    before = program()
    result = run_pipeline(before, [Replace(TO_CLAMP)], strict=True)
    assert result.program.operators()["aten.clamp"] == 1
    assert before.operators()["aten.relu"] == 1, "the program that was given is not edited"
    (replacement,) = result.replacements
    assert (replacement.rule, replacement.spelling, replacement.operator) == ("clamp", "relu", "aten.clamp")
    x = torch.randn(2, 3)
    assert torch.equal(result.program.module(x)[0], before.module(x)[0])


@pytest.mark.parametrize(("broken", "why"), [(Raises(), "halfway"), (Corrupts(), "relu"), (DropsOutput(), "interface")])
def test_a_failing_pass_is_rolled_back_and_named(broken: fxopt.Pass, why: str) -> None:
    before = program()
    result = run_pipeline(before, [broken, Replace(TO_CLAMP)])
    failed, done = result.records
    assert why in failed.failure and not failed.result.modified
    assert not done.failure
    assert result.program.operators() == {"aten.clamp": 1, "aten.add": 1, "aten.tanh": 1}
    with pytest.raises(PassError, match=f"pass {broken.name} failed"):
        run_pipeline(before, [broken], strict=True)


def test_a_replacement_of_another_shape_is_undone_and_recorded() -> None:
    before = program()
    result = run_pipeline(before, [Replace(TO_SUM)], strict=True)
    assert result.program.operators() == before.operators()
    assert any("shape" in miss.reason for miss in result.near_misses)


def test_a_wrong_rule_is_caught_by_numeric_verification() -> None:
    from fxopt import driver

    wrong = Options(passes=(Replace(TO_ABS),), verify="numeric")
    result = driver.rewrite(program(), wrong)
    assert "leaves the error budget" in result.records[0].failure
    assert result.program.operators()["aten.relu"] == 1
    with pytest.raises(PassError, match=r"rule abs at .*leaves the error budget"):
        driver.rewrite(program(), Options(passes=(Replace(TO_ABS),), verify="numeric", strict=True))
    right = driver.rewrite(program(), Options(passes=(Replace(TO_CLAMP),), verify="numeric", strict=True))
    assert right.program.operators()["aten.clamp"] == 1


def test_numeric_verification_accepts_attention_with_every_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        keep = torch.ones(5, 5, dtype=torch.bool).tril()
        scores = 3.0 * torch.tanh((q @ k.transpose(-2, -1) + bias) / 3.0)
        return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v

    inputs = tuple(torch.randn(1, 2, 5, 4) for _ in range(3))
    captured = from_export(attend, (*inputs, torch.randn(2, 5, 5)))
    from fxopt import driver

    result = driver.rewrite(captured, Options(verify="numeric", strict=True))
    assert result.program.operators()["fxopt.attention"] == 1


def test_passes_out_of_order_are_refused() -> None:
    with pytest.raises(OptionError, match="fuse-attention must come after contractions"):
        run_pipeline(program(), [FuseAttention()])
    run_pipeline(program(), [Synonyms(), Contractions(), Fills(), FuseAttention()])


def test_the_exact_pipeline_is_exact_ordered_and_idempotent() -> None:
    passes = exact_pipeline()
    assert {p.tier for p in passes} == {"exact"}
    once = run_pipeline(program(), passes, strict=True).program
    twice = run_pipeline(once, passes, strict=True).program
    assert once.operators() == twice.operators()


def test_the_verifier_names_a_node_whose_metadata_is_wrong() -> None:
    broken = program()
    (node,) = broken.graph.find_nodes(op="call_function", target=aten.tanh.default)
    node.meta["val"] = node.meta["val"].to(torch.float64)
    with pytest.raises(VerificationError, match=r"tanh computes float32.* where float64"):
        verify_structure(broken)
