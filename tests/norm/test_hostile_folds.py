"""Folds where values are degenerate, norms and weights are shared, or a result is wanted elsewhere too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt
from fxopt.analysis.channels import Obstacle
from fxopt.analysis.readers import find_readers
from fxopt.analysis.state import State
from fxopt.frontend.export import from_export
from fxopt.passes.norm.folding import Folded, run_folds
from fxopt.rewriter.builder import Builder
from tests.norm.support import EXACT, Net, assert_exact, assert_folds, assert_refused, draw, fold

C, OUT, LENGTH = 8, 6, 9
NORM, CHANNEL, CENTRE = ["fold-norm-affine"], ["fold-channel-affine"], ["centre-residual"]
TOKENS = (draw(2, LENGTH, C),)
IDS = (torch.arange(2 * C).view(2, C) % 11,)


def linear(out: int = C, **options: Any) -> nn.Linear:
    return nn.Linear(C, out, **options)


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = norm(x.transpose(1, 2)).transpose(1, 2)
    return y


def rep_norm(net: Any, x: Tensor) -> Any:
    return batch_norm(net.bn, x) + net.alpha * x


def _returned(net: Any, x: Tensor) -> Any:
    return net.a(y := batch_norm(net.bn, x)), y


def _read_by_an_activation(net: Any, x: Tensor) -> Any:
    return net.a(y := batch_norm(net.bn, x)) + torch.relu(y)


def _seen_before(net: Any, x: Tensor) -> Any:
    """What is normalised is moved about first, and read there too."""
    moved = net.a(x).transpose(1, 2)
    return net.bn(moved), torch.relu(moved)


def _both_ways(net: Any, ids: Tensor) -> Any:
    y = net.table(ids)
    return net.last(y.mT + y).square()


REFUSED: dict[str, tuple[list[str], tuple[Tensor, ...], Callable[[], Net], str]] = {
    "read by a layer, and returned": (
        CHANNEL, TOKENS, lambda: Net(_returned, a=linear(), bn=nn.BatchNorm1d(C)), "also a result of the model",
    ),
    "read by a layer and an activation": (
        CHANNEL, TOKENS, lambda: Net(_read_by_an_activation, a=linear(), bn=nn.BatchNorm1d(C)), "aten.relu at",
    ),
    "seen before it is normalised": (
        CHANNEL, TOKENS, lambda: Net(_seen_before, a=linear(), bn=nn.BatchNorm1d(C)),
        "before it, transpose is read elsewhere too",
    ),
    "tokens and channels added": (
        CENTRE, IDS, lambda: Net(_both_ways, table=nn.Embedding(11, C), last=nn.LayerNorm(C)),
        "is read with its channels as two different axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_fold_that_something_would_see_is_refused(name: str) -> None:
    passes, args, make, reason = REFUSED[name]
    assert_refused(make().double(), args, passes, reason)


UNRELATED: dict[str, Callable[[], Net]] = {
    "a quotient of two activations": lambda: Net(lambda n, x: n.a(x) / (x.abs() + 1), a=linear()),
    "a sum with a factor": lambda: Net(
        lambda n, x: torch.add(n.a(x) @ n.a.weight, n.shift, alpha=2), a=linear(), shift=torch.ones(C)
    ),
    "addcmul with a factor": lambda: Net(
        lambda n, x: torch.addcmul(n.shift, n.a(x), n.scale, value=2),
        a=linear(), scale=torch.ones(C), shift=torch.ones(C),
    ),
    "addcmul over two axes": lambda: Net(
        lambda n, x: torch.addcmul(n.shift, n.a(x), n.scale), a=linear(), scale=torch.ones(C), shift=torch.ones(9, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNRELATED)
def test_what_is_no_scale_per_channel_is_left_alone(name: str) -> None:
    assert not fold(UNRELATED[name]().double(), TOKENS, CHANNEL).replacements


def test_a_result_that_a_layer_writes_may_be_returned_and_read() -> None:
    """The layer before it takes the fold, so everybody sees what they saw."""
    net = Net(lambda n, x: (torch.relu(y := batch_norm(n.bn, n.a(x))), y, n.a(y)), a=linear(), bn=nn.BatchNorm1d(C))
    assert_folds(net, TOKENS, CHANNEL)


@pytest.mark.parametrize("shared", [False, True])
def test_a_rep_norm_that_two_layers_read_before_a_tied_head(shared: bool) -> None:
    """The last norm of a decoder whose head is its embedding."""

    def run(net: Any, ids: Tensor) -> Any:
        normal = rep_norm(net, net.table(ids))
        return F.linear(normal, net.table.weight), (F.linear(normal, net.table.weight) if shared else net.a(normal))

    other = nn.Identity() if shared else linear(OUT, bias=False)
    net = Net(run, table=nn.Embedding(11, C), bn=nn.BatchNorm1d(C), alpha=torch.ones(1), a=other)
    assert_folds(net, IDS, CHANNEL)
    with torch.no_grad():
        rewritten: Any = fxopt.rewrite(net.double(), IDS, passes=CHANNEL)
        assert torch.equal(rewritten.table.weight, net.table.weight)
        folded = dict(rewritten.folded_weights.named_buffers())
        slope = net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt() + net.alpha
        torch.testing.assert_close(folded["table_weight"], net.table.weight * slope, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("passes", [NORM, CHANNEL, CENTRE], ids=str)
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_tokens_without_variance(passes: list[str], value: float) -> None:
    """All channels of a token alike: a LayerNorm gives its bias, the RMSNorm of the centred stream nothing else."""
    net = Net(
        lambda n, x: n.a(n.norm(x @ n.same) if passes != CHANNEL else batch_norm(n.bn, x)).square(),
        norm=nn.LayerNorm(C), bn=nn.BatchNorm1d(C), a=linear(), same=torch.ones(C, C),
    )  # fmt: skip
    with torch.no_grad():
        net.same.fill_(value)
        net.bn.running_var.zero_()
        net.double()
        args = (torch.full((2, LENGTH, C), value, dtype=torch.float64),)
        rewritten = fxopt.rewrite(net, args, passes=passes, strict=True)
        assert list(rewritten.folded_weights.buffers())
        assert_exact(rewritten, net, args)


def test_a_norm_that_nothing_reads_is_refused() -> None:
    program = from_export(Net(lambda n, x: n.a(n.norm(x)), norm=nn.LayerNorm(C), a=linear()).double(), TOKENS)
    (norm,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    (layer,) = norm.users
    layer.replace_all_uses_with(norm.args[0])
    program.graph.erase_node(layer)
    found = find_readers(program, State(program), norm, 2, shifted=True)
    assert isinstance(found, Obstacle) and found.reason == f"nothing reads {norm}"


def test_a_fold_of_another_shape_is_undone() -> None:
    program = from_export(Net(lambda n, x: n.a(n.norm(x)), norm=nn.LayerNorm(C), a=linear(OUT)).double(), TOKENS)
    before = program.code
    (layer,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    builder = Builder(program, layer, "norm-affine")
    narrow = builder.call(torch.ops.aten.relu.default, builder.call(torch.ops.aten.sum.dim_IntList, layer.args[0], [0]))
    result = run_folds(program, "norm-affine", [Folded(layer, ((layer, narrow),), tuple(builder.created), "nothing")])
    assert not result.modified
    (miss,) = result.near_misses
    assert miss.reason.startswith("the folded layer would have shape")
    program.module.recompile()
    assert program.code == before
