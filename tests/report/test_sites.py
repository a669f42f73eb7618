"""Which places of a graph are sites, and what is said of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt.codegen.meanings  # noqa: F401 - the canonical operators
from fxopt.frontend.dynamo import from_dynamo
from fxopt.ir.program import Program
from fxopt.report.sites import collect_sites
from tests.report.support import (
    DIVIDED,
    GELU_TO_SILU,
    REFUSE_SOFTMAX,
    SILU_TO_RELU,
    Block,
    RulePass,
    capture,
    kinds,
    run,
    sites,
)

q, x = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 8)
w_up, w_down = torch.randn(16, 8), torch.randn(8, 16)


def _by_hand(q: Tensor) -> Tensor:
    scores = q @ q.transpose(-2, -1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ q


def _plus_one(q: Tensor) -> Tensor:
    weights = (q @ q.transpose(-2, -1)).exp()
    return weights / (1 + weights.sum(-1, keepdim=True)) @ q


def _column_overwritten(q: Tensor) -> Tensor:
    scores = q @ q.mT
    return scores.select_scatter(torch.zeros(2, 3, 5), -1, 0).softmax(-1) @ q


def _largest(q: Tensor) -> Tensor:
    values, index = (q @ q.mT).softmax(-1).topk(2, -1)
    return torch.zeros(2, 3, 5, 5).scatter(-1, index, values) @ q


def _thresholded(q: Tensor) -> Tensor:
    weights = (q @ q.mT).softmax(-1)
    return torch.where(weights > 0.05, weights, 0.0) @ q


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def _layer(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x.pow(3))))


def _mlp(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, up, down: F.linear(activation(F.linear(x, up)), down)


ATTENTIONS: dict[str, Callable[..., Any]] = {
    "matmul": lambda q: (q @ q.transpose(-2, -1) / 8).softmax(-1) @ q,
    "einsum": lambda q: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, q).softmax(-1), q),
    "masked, dropped and cast": lambda q: (
        F.dropout((q @ q.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9).float().softmax(-1), 0.1).to(q.dtype)
        @ q
    ),
    "over queries": lambda q: (q @ q.mT).softmax(-2) @ q,
    "logarithms": lambda q: (q @ q.mT).log_softmax(-1) @ q,
    "sink": lambda q: torch.cat([q @ q.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ q,
    "written out": _by_hand,
    "plus one": _plus_one,
    "column overwritten": _column_overwritten,
    "largest weights": _largest,
    "thresholded": _thresholded,
    "one operator": lambda q: F.scaled_dot_product_attention(q, q, q),
    "linear": lambda q: F.linear(F.linear(q[0, 0], q[0, 1]).softmax(-1), q[0, 2].T),
}
NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 5),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
    "rms by hand": _rms,
    "layer by hand": _layer,
    "standard deviation": _standard,
    "power": lambda x: x * torch.pow(x.square().mean(-1, keepdim=True) + 1e-6, -0.5),
    "sum over size": lambda x: x / ((x * x).sum(-1, keepdim=True) / 8 + 1e-6).sqrt(),
}
MLPS: dict[str, Callable[..., Any]] = {
    "gelu": _mlp(F.gelu),
    "silu": _mlp(F.silu),
    "relu": _mlp(F.relu),
    "silu by hand": _mlp(lambda x: x * x.sigmoid()),
    "quick gelu": _mlp(lambda x: x * torch.sigmoid(1.702 * x)),
    "tanh gelu by hand": _mlp(_tanh_gelu),
    "erf gelu by hand": _mlp(lambda x: x * 0.5 * (1 + torch.erf(x / 1.41421356))),
    "squared relu": _mlp(lambda x: F.relu(x).square()),
    "gated": lambda x, up, down: F.linear(F.silu(F.linear(x, up)) * F.linear(x, up * 2), down),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_found(name: str) -> None:
    (found,) = sites(ATTENTIONS[name], q)
    assert (found.kind, found.status) == ("attention", "kept")
    assert found.reason
    assert found.source.location.startswith(__file__)


@pytest.mark.parametrize("name", NORMS)
def test_norm_is_found(name: str) -> None:
    assert kinds(sites(NORMS[name], x)) == ["norm"]


@pytest.mark.parametrize("name", MLPS)
def test_mlp_is_found_once(name: str) -> None:
    assert kinds(sites(MLPS[name], x, w_up, w_down)) == ["mlp"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1) @ x.mT,
        lambda x: (x @ x.mT).softmax(-1),
        lambda x: (x @ x.mT).relu() @ x,
        lambda x: x / x.pow(2).sum(-1, keepdim=True).sqrt(),
        lambda x: x * torch.rsqrt(x + 1e-6),
        lambda x: x.mean(-1).sqrt(),
    ],
    ids=["no scores", "no values", "no softmax", "unit length", "pointwise root", "no scaling"],
)
def test_other_computations_are_no_sites(function: Callable[..., Any]) -> None:
    assert sites(function, x) == ()


class _Gated(nn.Module):
    """A softmax and a tanh between projections: a gate and a pooler, neither an attention nor an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.pool, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.pool(self.gate(x).softmax(-1) * x)))
        return result


def test_gates_and_poolers_are_no_sites() -> None:
    assert sites(_Gated(), x) == ()


def test_sites_stand_in_graph_order_with_their_modules() -> None:
    found = sites(nn.Sequential(Block(), Block()).eval(), x)
    assert kinds(found) == ["norm", "attention", "norm", "mlp"] * 2
    assert [site.source.module for site in found][:3] == ["0.norm", "0", "0.other"]
    assert ".softmax(-1)" in found[1].source.code


def test_sites_are_found_in_dynamo_graphs_too() -> None:
    (program,) = _dynamo_programs(Block())
    assert kinds(collect_sites(run(program))) == ["norm", "attention", "norm", "mlp"]


def test_modules_of_dynamo_graphs_are_named_from_the_root_whatever_it_is_called() -> None:
    (program,) = _dynamo_programs(_ShortSelf())
    assert [site.source.module for site in collect_sites(run(program))][:3] == ["inner.norm", "inner", "inner.other"]


def _dynamo_programs(model: nn.Module) -> list[Program]:
    programs: list[Program] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        programs.append(from_dynamo(module, inputs))
        return module.forward

    torch.compile(model.eval(), backend=backend)(x)
    return programs


def test_column_softmax_says_which_axis() -> None:
    (found,) = sites(ATTENTIONS["over queries"], q)
    assert "axis -2 of 4" in found.reason
    assert "q @ k.transpose(-2, -1)" in found.reason


def test_a_hint_names_what_is_done_to_the_weights() -> None:
    hints = {name: sites(ATTENTIONS[name], q)[0].reason for name in ("plus one", "largest weights", "logarithms")}
    assert "divided by more than the sum of their exponentials" in hints["plus one"]
    assert "topk, scatter between the softmax and the values" in hints["largest weights"]
    assert "the weights are logarithms" in hints["logarithms"]


class _Router(nn.Module):
    """Experts chosen by a softmax over a projection, weights of the model on both sides: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        values, index = self.router(x).softmax(-1).topk(2, -1)
        result: Tensor = self.experts(torch.zeros(2, 5, 4).scatter(-1, index, values))
        return result


def test_a_router_is_no_attention() -> None:
    assert sites(_Router(), x) == ()


class _ShortSelf(nn.Module):
    """A module whose ``forward`` calls itself something else than ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(s, x: Tensor) -> Tensor:
        result: Tensor = s.inner(x)
        return result


def test_whole_norm_is_left_to_the_base_compiler() -> None:
    (found,) = sites(NORMS["layer_norm"], x)
    assert found.reason == "it already is one operator and is left to the base compiler"


def test_rewritten_site_comes_from_its_rule() -> None:
    (found,) = sites(MLPS["gelu"], x, w_up, w_down, passes=[RulePass((GELU_TO_SILU,))])
    assert (found.status, found.rule, found.reason) == ("rewritten", "gelu-to-silu", "gelu -> aten.silu")


def test_site_rewritten_twice_is_listed_once_with_the_last_rule() -> None:
    passes = [RulePass((GELU_TO_SILU,)), RulePass((SILU_TO_RELU,))]
    (found,) = sites(MLPS["gelu"], x, w_up, w_down, passes=passes)
    assert (found.status, found.rule) == ("rewritten", "silu-to-relu")
    assert {"gelu", "silu_default", "relu_default"} <= set(found.nodes)


def test_refused_match_gives_its_reason_and_node_first() -> None:
    (found,) = sites(ATTENTIONS["over queries"], q, passes=[RulePass((DIVIDED, REFUSE_SOFTMAX))])
    assert (found.status, found.rule, found.reason) == ("kept", "refuse-softmax", "refused on purpose")
    assert found.nodes[0] == "softmax"


def test_near_miss_tells_how_far_it_matched() -> None:
    (found,) = sites(lambda q: (q @ q.mT * 0.5).softmax(-1) @ q, q, passes=[RulePass((DIVIDED,))])
    assert found.rule == "divided"
    assert found.reason.startswith("matched 2 nodes of the spelling 'divided scores'; then: expected div")


def test_canonical_operator_without_a_site_of_its_own_counts_as_rewritten() -> None:
    program = capture(lambda x: x * 1, x)
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    node.target = torch.ops.fxopt.rms_norm.default
    node.args = (node.args[0], 1, None, 1e-6, torch.float32, False)
    (found,) = collect_sites(run(program))
    assert (found.kind, found.status, found.reason) == ("norm", "rewritten", "canonical fxopt.rms_norm")


def test_attention_inside_a_branch_is_listed_as_out_of_reach() -> None:
    attend = ATTENTIONS["matmul"]
    program = capture(lambda q: torch.cond(q.sum() > 0, attend, lambda q: q * 2, (q,)), q)
    (found,) = collect_sites(run(program))
    assert found.kind == "attention"
    assert "inside a region of cond" in found.reason
