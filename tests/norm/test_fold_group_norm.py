"""The pass `fold-norm-affine` on norms that have their channels in the second place: GroupNorm and InstanceNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import fxopt
from fxopt.report.sites import collect_sites
from tests.norm.support import EXACT, Net, assert_exact, assert_folds, assert_refused, draw, fold

C, OUT = 8, 6
PASSES = ["fold-norm-affine"]
IMAGES = (draw(2, C, 6, 5),)


def linear(out: int = OUT, **options: Any) -> nn.Linear:
    return nn.Linear(C, out, **options)


def group_norm(groups: int = 2, **options: Any) -> nn.GroupNorm:
    return nn.GroupNorm(groups, C, **options)


def pointwise(out: int = OUT, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, out, 1, **options)


def _spatial_attention(net: Any, x: Tensor) -> Any:
    """A diffusion model's attention over pixels: a group norm, then queries, keys and values of tokens."""
    tokens = net.norm(x).flatten(2).transpose(1, 2)
    return tuple(layer(tokens) for layer in (net.q, net.k, net.v))


FIRES: dict[str, tuple[tuple[Tensor, ...], Callable[[], Net]]] = {
    "groups before a convolution": (
        IMAGES, lambda: Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(), a=nn.Conv2d(C, OUT, 3)),
    ),
    "groups of one channel, strided and grouped convolution without bias": (
        IMAGES,
        lambda: Net(
            lambda n, x: n.a(n.norm(x)), norm=group_norm(C), a=nn.Conv2d(C, 4, 2, stride=2, groups=4, bias=False)
        ),
    ),
    "one group before a pointwise layer": (
        IMAGES, lambda: Net(lambda n, x: x + n.a(n.norm(x)), norm=group_norm(1), a=pointwise(C)),
    ),
    "groups before queries, keys and values": (
        IMAGES,
        lambda: Net(_spatial_attention, norm=group_norm(), q=linear(), k=linear(bias=False), v=linear(4)),
    ),
    "groups before pooling and a head": (
        IMAGES, lambda: Net(lambda n, x: n.a(n.norm(x).mean((2, 3))), norm=group_norm(4), a=linear()),
    ),
    "groups of a vector": ((draw(9, C),), lambda: Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(), a=linear())),
    "groups of three axes": (
        (draw(2, C, 4, 3, 5),), lambda: Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(), a=nn.Conv3d(C, OUT, 2)),
    ),
    "groups, as many pixels as channels": (
        (draw(2, C, C, C),),
        lambda: Net(lambda n, x: n.a(n.norm(x).permute(0, 2, 3, 1)), norm=group_norm(), a=linear(C)),
    ),
    "padded convolution without a shift of groups": (
        IMAGES,
        lambda: Net(
            lambda n, x: n.a(F.group_norm(x, 2, n.weight)), weight=torch.ones(C), a=nn.Conv2d(C, OUT, 3, padding=1)
        ),
    ),
    "a shift of groups alone": (
        IMAGES, lambda: Net(lambda n, x: n.a(F.group_norm(x, 2, None, n.bias)), bias=torch.ones(C), a=pointwise()),
    ),
    "each channel of each sample": (
        IMAGES, lambda: Net(lambda n, x: n.a(n.norm(x)), norm=nn.InstanceNorm2d(C, affine=True), a=pointwise()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_fold_norm_affine_fires_on_the_second_axis(name: str) -> None:
    args, make = FIRES[name]
    result = assert_folds(make(), args, PASSES)
    (site,) = (site for site in collect_sites(result) if site.kind == "norm")
    assert (site.rule, site.status) == ("norm-affine", "rewritten")
    (norm,) = (node for node in result.program.graph.nodes if "_norm" in str(node.target))
    weights = norm.args[2:4] if "group" in str(norm.target) else norm.args[1:3]
    assert weights == (None, None), "the norm that stays has no weights"


def _pooled(net: Any, x: Tensor) -> Any:
    """PoolFormer's mixer: what is near, less the token itself."""
    y = net.norm(x)
    return net.a(F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)


REFUSED: dict[str, tuple[tuple[Tensor, ...], Callable[[], Net], str]] = {
    "activation behind": (
        IMAGES, lambda: Net(lambda n, x: n.a(F.silu(n.norm(x))), norm=group_norm(), a=pointwise()), "aten.silu at",
    ),
    "padded convolution": (
        IMAGES, lambda: Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(), a=nn.Conv2d(C, OUT, 3, padding=1)),
        "pads with zeros",
    ),
    "zero padding": (
        IMAGES, lambda: Net(lambda n, x: n.a(F.pad(n.norm(x), (1, 1))), norm=group_norm(), a=pointwise()),
        "zero padding lies between",
    ),
    "returned": (
        IMAGES, lambda: Net(lambda n, x: (n.a(y := n.norm(x)), y), norm=group_norm(), a=pointwise()),
        "also a result of the model",
    ),
    "residual": (
        IMAGES, lambda: Net(lambda n, x: (y := n.norm(x)) + n.a(y), norm=group_norm(), a=pointwise(C)),
        "aten.add at",
    ),
    "pooled and subtracted": (IMAGES, lambda: Net(_pooled, norm=group_norm(1), a=pointwise()), "aten.sub at"),
    "transposed convolution": (
        IMAGES, lambda: Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(), a=nn.ConvTranspose2d(C, OUT, 2)),
        "is no linear layer",
    ),
    "groups become an axis": (
        IMAGES,
        lambda: Net(lambda n, x: n.a(n.norm(x).view(2, 2, 4, 30).mT), norm=group_norm(), a=nn.Linear(4, OUT)),
        "splits or joins the channels",
    ),
    "shuffled channels": (
        IMAGES,
        lambda: Net(lambda n, x: n.a(F.channel_shuffle(n.norm(x), 2)), norm=group_norm(), a=pointwise()),
        "channel_shuffle",
    ),
    "columns as channels": (
        (draw(2, C, 6, C),), lambda: Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(), a=linear()),
        "does not read its channels as channels",
    ),
    "weight from the inputs": (
        (*IMAGES, draw(C)),
        lambda: Net(lambda n, x, w: n.a(F.group_norm(x, 2, w)), a=pointwise()), "depends on the inputs of the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fold_norm_affine_refuses_on_the_second_axis(name: str) -> None:
    args, make, reason = REFUSED[name]
    assert_refused(make().double(), args, PASSES, reason)


UNRELATED: dict[str, Callable[[], Net]] = {
    "a norm without weights": lambda: Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(affine=False), a=pointwise()),
    "a scale made of the inputs": lambda: Net(
        lambda n, x: n.a(F.group_norm(x, 2) * n.b(x.mean((2, 3)))[..., None, None]), a=pointwise(), b=linear(C)
    ),
    "an instance norm with running statistics": lambda: Net(
        lambda n, x: n.a(n.norm(x)), norm=nn.InstanceNorm2d(C, affine=True, track_running_stats=True), a=pointwise()
    ),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_fold_norm_affine_leaves_alone(name: str) -> None:
    assert not fold(UNRELATED[name]().double(), IMAGES, PASSES).replacements


@pytest.mark.parametrize("name", ["groups before a convolution", "each channel of each sample"])
def test_scale_of_zero(name: str) -> None:
    args, make = FIRES[name]
    net = make()
    with torch.no_grad():
        net.norm.weight[[0, 3]] = 0.0
    assert_folds(net, args, PASSES)


def test_groups_without_variance() -> None:
    """All that such a group gives is its shift."""
    args, make = FIRES["groups of one channel, strided and grouped convolution without bias"]
    image = args[0].clone()
    image[:, [1, 4]] = 0.0
    assert_folds(make(), (image,), PASSES)


def test_one_norm_and_one_layer_for_two_places() -> None:
    net = Net(lambda n, x: n.a(n.norm(torch.relu(n.a(n.norm(x))))), norm=group_norm(), a=pointwise(C))
    assert_folds(net, IMAGES, PASSES, 2)


def test_weights_of_a_compiled_graph_stay() -> None:
    net = FIRES["groups before a convolution"][1]()
    (site,) = fxopt.explain(net, draw(2, C, 6, 5, dtype=torch.float32)).sites
    assert (site.kind, site.status) == ("norm", "kept")
    assert "in a compiled graph weights are inputs" in site.reason


@torch.no_grad()
def test_dynamic_sizes() -> None:
    net = FIRES["groups before queries, keys and values"][1]().double()
    shapes = (({0: Dim("batch", min=2), 2: Dim("height", min=2), 3: Dim("width", min=2)},),)
    rewritten = fxopt.rewrite(net, IMAGES, passes=PASSES, dynamic_shapes=shapes, strict=True)
    for x in (*IMAGES, draw(3, C, 4, 7)):
        assert_exact(rewritten, net, (x,))


@torch.no_grad()
def test_padded_convolution_would_have_been_wrong() -> None:
    """What that refusal is for."""
    net = Net(lambda n, x: n.a(n.norm(x)), norm=group_norm(), a=nn.Conv2d(C, OUT, 3, padding=1)).double()
    weight = net.a.weight * net.norm.weight[:, None, None]
    bias = net.a.bias + (net.a.weight * net.norm.bias[:, None, None]).sum((1, 2, 3))
    wrong = F.conv2d(F.group_norm(IMAGES[0], 2), weight, bias, padding=1)
    difference = (wrong - net(*IMAGES)).abs()
    assert difference.max() > 1e3 * EXACT and difference[..., 1:-1, 1:-1].max() < EXACT * wrong.abs().max()
