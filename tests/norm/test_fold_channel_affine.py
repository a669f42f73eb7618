"""The pass `fold-channel-affine`: what it folds into the layers before and behind, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt
from fxopt.passes.norm.fold_channel_affine import FoldChannelAffine
from fxopt.report.sites import collect_sites
from tests.norm.support import EXACT, Net, assert_folds, assert_refused, draw, fold, randomise

C, OUT = 8, 6
PASSES = ["fold-channel-affine"]
TOKENS = (draw(2, 9, C),)
IMAGES = (draw(2, C, 6, 5),)
BEFORE, BEHIND = "before it", "behind it"


def linear(out: int = C, **options: Any) -> nn.Linear:
    return nn.Linear(C, out, **options)


def conv(out: int = C, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, out, size, **options)


def over_channels(norm: nn.Module, x: Tensor) -> Any:
    """Tokens ``[B, N, C]`` through a BatchNorm1d, which has its channels in the middle."""
    return norm(x.transpose(1, 2)).transpose(1, 2)


def rep_norm(norm: nn.Module, alpha: Tensor, x: Tensor) -> Any:
    """RepBN as SLAB writes it."""
    x = x.transpose(1, 2)
    return (norm(x) + alpha * x).transpose(1, 2)


def rep_norm_apart(norm: nn.Module, alpha: Tensor, x: Tensor) -> Any:
    """RepBN whose second term is not transposed with the first."""
    return over_channels(norm, x) + alpha * x


def _cut(net: Any, x: Tensor) -> Any:
    """A patch embedding with a norm over its tokens."""
    return rep_norm(net.bn, net.alpha, net.conv(x).flatten(2).transpose(1, 2))


def _single(net: Any, x: Tensor) -> Any:
    """A norm in float32 around a model of another dtype."""
    wide = torch.float32 if x.dtype != torch.float64 else x.dtype
    return (net.conv(x).to(wide) * net.scale.to(wide) + net.shift.to(wide)).to(x.dtype)


def _windows(net: Any, x: Tensor) -> Any:
    image = torch.roll(net.bn(x), (1, -1), (2, 3)).permute(0, 2, 3, 1)
    return net.a(image.reshape(2, 2, 3, 5, C).transpose(1, 2))


#: Where it is folded, the arguments, and the model.
FIRES: dict[str, tuple[str, tuple[Tensor, ...], Callable[[], Net]]] = {
    "conv and batch norm": (
        BEFORE, IMAGES, lambda: Net(lambda n, x: n.bn(n.conv(x)), conv=conv(), bn=nn.BatchNorm2d(C)),
    ),
    "padded convolution": (
        BEFORE, IMAGES, lambda: Net(lambda n, x: n.bn(n.conv(x)), conv=conv(padding=1), bn=nn.BatchNorm2d(C)),
    ),
    "convolution without bias": (
        BEFORE, IMAGES, lambda: Net(lambda n, x: n.bn(n.conv(x)), conv=conv(bias=False), bn=nn.BatchNorm2d(C)),
    ),
    "depthwise": (
        BEFORE, IMAGES, lambda: Net(lambda n, x: n.bn(n.conv(x)), conv=conv(groups=C), bn=nn.BatchNorm2d(C)),
    ),
    "norm without weights": (
        BEFORE, IMAGES,
        lambda: Net(lambda n, x: n.bn(n.conv(x)), conv=conv(), bn=nn.BatchNorm2d(C, affine=False)),
    ),
    "linear": (
        BEFORE, (draw(9, C),), lambda: Net(lambda n, x: n.bn(n.a(x)), a=linear(), bn=nn.BatchNorm1d(C)),
    ),
    "addmm": (
        BEFORE, (draw(9, C),),
        lambda: Net(
            lambda n, x: n.bn(torch.addmm(n.shift, x, n.weight)),
            shift=torch.ones(C), weight=torch.ones(C, C), bn=nn.BatchNorm1d(C),
        ),
    ),
    "matmul": (
        BEFORE, TOKENS,
        lambda: Net(lambda n, x: over_channels(n.bn, x @ n.weight), weight=torch.ones(C, C), bn=nn.BatchNorm1d(C)),
    ),
    "linear, channels moved": (
        BEFORE, TOKENS, lambda: Net(lambda n, x: over_channels(n.bn, n.a(x)), a=linear(), bn=nn.BatchNorm1d(C)),
    ),
    "RepBN behind patches": (
        BEFORE, IMAGES,
        lambda: Net(_cut, conv=conv(size=2, stride=2), bn=nn.BatchNorm1d(C), alpha=torch.ones(1)),
    ),
    "RepBN behind a layer": (
        BEFORE, TOKENS,
        lambda: Net(
            lambda n, x: rep_norm_apart(n.bn, n.alpha, n.a(x)), a=linear(), bn=nn.BatchNorm1d(C), alpha=torch.ones(1)
        ),
    ),
    "scale of a layer": (
        BEFORE, TOKENS, lambda: Net(lambda n, x: x + n.scale * n.a(x), a=linear(), scale=torch.ones(C)),
    ),
    "over another axis before": (
        BEHIND, (draw(2, C, 6, 5),),
        lambda: Net(lambda n, x: n.conv(n.bn(x * n.scale)), conv=conv(OUT), bn=nn.BatchNorm2d(C), scale=torch.ones(5)),
    ),
    "scale and shift": (
        BEFORE, TOKENS,
        lambda: Net(lambda n, x: n.a(x) * n.scale + n.shift, a=linear(), scale=torch.ones(C), shift=torch.ones(C)),
    ),
    "addcmul": (
        BEFORE, TOKENS,
        lambda: Net(
            lambda n, x: torch.addcmul(n.shift, n.a(x), n.scale), a=linear(), scale=torch.ones(C), shift=torch.ones(C)
        ),
    ),
    "difference over deviation": (
        BEFORE, TOKENS,
        lambda: Net(lambda n, x: (n.a(x) - n.shift) / n.scale, a=linear(), scale=torch.ones(C), shift=torch.ones(C)),
    ),
    "norms one after the other": (
        BEFORE, IMAGES,
        lambda: Net(
            lambda n, x: n.bn(n.conv(x)) * n.scale[:, None, None] * 0.5 + 2,
            conv=conv(), bn=nn.BatchNorm2d(C), scale=torch.ones(C),
        ),
    ),
    "in another dtype": (
        BEFORE, TOKENS, lambda: Net(_single, conv=linear(), scale=torch.ones(C), shift=torch.ones(C)),
    ),
    "behind padding, without shift": (
        BEFORE, IMAGES,
        lambda: Net(lambda n, x: F.pad(n.conv(x), (1, 1)) * n.scale[:, None, None], conv=conv(), scale=torch.ones(C)),
    ),
    "behind a mean": (
        BEFORE, TOKENS, lambda: Net(lambda n, x: n.bn(n.a(x).mean(1)), a=linear(), bn=nn.BatchNorm1d(C)),
    ),
    "identity beside a norm": (
        BEFORE, IMAGES, lambda: Net(lambda n, x: (y := n.conv(x)) + n.bn(y), conv=conv(), bn=nn.BatchNorm2d(C)),
    ),
    "before a layer": (
        BEHIND, TOKENS, lambda: Net(lambda n, x: n.a(over_channels(n.bn, x)), a=linear(OUT), bn=nn.BatchNorm1d(C)),
    ),
    "RepBN before queries, keys and values": (
        BEHIND, TOKENS,
        lambda: Net(
            lambda n, x: tuple(layer(y) for y in [rep_norm(n.bn, n.alpha, x)] for layer in (n.q, n.k, n.v)),
            bn=nn.BatchNorm1d(C), alpha=torch.ones(1), q=linear(), k=linear(4, bias=False), v=linear(4),
        ),
    ),
    "before a convolution": (
        BEHIND, IMAGES, lambda: Net(lambda n, x: n.conv(n.bn(x)), conv=conv(OUT), bn=nn.BatchNorm2d(C)),
    ),
    "before a depthwise convolution": (
        BEHIND, IMAGES, lambda: Net(lambda n, x: n.conv(n.bn(x)), conv=conv(C, groups=C), bn=nn.BatchNorm2d(C)),
    ),
    "before a padded convolution, without shift": (
        BEHIND, IMAGES,
        lambda: Net(lambda n, x: n.conv(x * n.scale[:, None, None]), conv=conv(OUT, padding=1), scale=torch.ones(C)),
    ),
    "before windows": (BEHIND, IMAGES, lambda: Net(_windows, a=linear(OUT), bn=nn.BatchNorm2d(C))),
    "before pooling and a head": (
        BEHIND, TOKENS,
        lambda: Net(lambda n, x: n.a(rep_norm(n.bn, n.alpha, x).mean(1)),
                    a=linear(OUT), bn=nn.BatchNorm1d(C), alpha=torch.ones(1)),
    ),
    "what is normalised is read elsewhere too": (
        BEHIND, TOKENS,
        lambda: Net(lambda n, x: (y := n.b(x)) + n.a(over_channels(n.bn, y)),
                    a=linear(), b=linear(), bn=nn.BatchNorm1d(C)),
    ),
}  # fmt: skip


#: Where all values are equal, the original happens to round nothing, and its budget is that of a single rounding.
LUCKY = {"norm without weights"}


@pytest.mark.parametrize("name", FIRES)
def test_fold_channel_affine_fires(name: str) -> None:
    where, args, make = FIRES[name]
    net = make()
    result = assert_folds(net, args, PASSES, verified=name not in LUCKY)
    assert where in result.replacements[-1].site.reason
    assert not result.program.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    has_norm = any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in net.modules()) or hasattr(net, "shift")
    assert result.replacements[-1].site.kind == ("norm" if has_norm else "linear")


def _rep_net(alpha: float = 0.7) -> Net:
    net = Net(_cut, conv=conv(size=2, stride=2), bn=nn.BatchNorm1d(C), alpha=torch.ones(1))
    with torch.no_grad():
        net.alpha.fill_(alpha)
    return net


@torch.no_grad()
def test_the_bias_of_the_layer_is_scaled_by_alpha_too() -> None:
    """``a ⊙ c + b``; folding it as a plain BatchNorm, ``s(c − μ) + β``, leaves ``α·c`` out."""
    net = _rep_net().double()
    rewritten: Any = fxopt.rewrite(net, IMAGES, passes=PASSES)
    slope = net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt()
    right = (slope + net.alpha) * net.conv.bias + net.bn.bias - slope * net.bn.running_mean
    torch.testing.assert_close(rewritten.folded_weights.conv_bias, right, rtol=EXACT, atol=EXACT)
    assert ((net.alpha * net.conv.bias).abs() > 0.01).any()


@pytest.mark.parametrize("name", ["conv and batch norm", "before a layer", "RepBN behind patches"])
def test_a_channel_without_variance(name: str) -> None:
    _, args, make = FIRES[name]
    net = make()
    net.bn.running_var[[0, 3]] = 0.0
    assert_folds(net, args, PASSES)


@pytest.mark.parametrize("name", ["conv and batch norm", "before a layer", "RepBN behind patches"])
def test_a_scale_of_zero(name: str) -> None:
    _, args, make = FIRES[name]
    net = make()
    with torch.no_grad():
        net.bn.weight[[1, 2]] = 0.0
    assert_folds(net, args, PASSES)


@pytest.mark.parametrize("name", ["RepBN behind patches", "RepBN before queries, keys and values"])
@torch.no_grad()
def test_alpha_that_cancels_the_slope(name: str) -> None:
    """``α = −s``: the channel is ``b`` whatever ``x`` is."""
    _, args, make = FIRES[name]
    net = make()
    net.bn.running_var.fill_(1 - net.bn.eps)
    net.bn.weight.fill_(0.5)
    net.alpha.fill_(-0.5)
    assert_folds(net, args, PASSES)


def test_a_layer_between_two_norms_is_rounded_once() -> None:
    """Both its sides are folded into the same weight."""
    net = Net(lambda n, x: over_channels(n.bn, n.a(n.norm(x))), a=linear(), norm=nn.LayerNorm(C), bn=nn.BatchNorm1d(C))
    assert_folds(net, TOKENS, ["fold-norm-affine", "fold-channel-affine"], 2)
    half = net.bfloat16()
    with torch.no_grad():
        rewritten: Any = fxopt.rewrite(half, (TOKENS[0].bfloat16(),), strict=True)
        slope = net.bn.weight.double() / (net.bn.running_var.double() + net.bn.eps).sqrt()
        once = slope[:, None] * net.a.weight.double() * net.norm.weight.double()
        assert torch.equal(rewritten.folded_weights.a_weight, once.bfloat16())


REFUSED: dict[str, tuple[tuple[Tensor, ...], Callable[[], Net], str]] = {
    "between activations": (
        IMAGES, lambda: Net(lambda n, x: torch.relu(n.bn(torch.relu(x))), bn=nn.BatchNorm2d(C)),
        "aten.relu is no linear layer; behind it, aten.relu at",
    ),
    "of the input, returned": (
        IMAGES, lambda: Net(lambda n, x: n.bn(x), bn=nn.BatchNorm2d(C)), "it is also a result of the model",
    ),
    "written value returned too": (
        IMAGES, lambda: Net(lambda n, x: (y := n.conv(x), n.bn(y)), conv=conv(), bn=nn.BatchNorm2d(C)),
        "output reads conv2d too",
    ),
    "zero padding before": (
        IMAGES, lambda: Net(lambda n, x: n.bn(F.pad(n.conv(x), (1, 1))), conv=conv(), bn=nn.BatchNorm2d(C)),
        "zero padding lies between",
    ),
    "zero padding behind": (
        IMAGES, lambda: Net(lambda n, x: n.conv(F.pad(n.bn(x), (1, 1))), conv=conv(), bn=nn.BatchNorm2d(C)),
        "zero padding lies between",
    ),
    "padded convolution behind": (
        IMAGES, lambda: Net(lambda n, x: n.conv(n.bn(x)), conv=conv(padding=1), bn=nn.BatchNorm2d(C)),
        "pads with zeros",
    ),
    "residual behind": (
        IMAGES, lambda: Net(lambda n, x: (y := n.bn(x)) + n.conv(y), conv=conv(padding=1), bn=nn.BatchNorm2d(C)),
        "pads with zeros",
    ),
    "grouped into heads": (
        TOKENS,
        lambda: Net(lambda n, x: n.bn(n.a(x).view(18, 4, 2)), a=linear(), bn=nn.BatchNorm1d(4)),
        "splits or joins the channels",
    ),
    "tokens as channels": (
        TOKENS, lambda: Net(lambda n, x: n.bn(n.a(x)), a=linear(), bn=nn.BatchNorm1d(9)),
        "does not write its channels as channels",
    ),
    "as many tokens as channels": (
        (draw(2, C, C),), lambda: Net(lambda n, x: n.bn(n.a(x)), a=linear(), bn=nn.BatchNorm1d(C)),
        "does not write its channels as channels",
    ),
    "transposed convolution": (
        IMAGES,
        lambda: Net(lambda n, x: n.bn(n.conv(x)), conv=nn.ConvTranspose2d(C, C, 2), bn=nn.BatchNorm2d(C)),
        "is no linear layer",
    ),
    "weight from the inputs": (
        (draw(2, C, C), draw(C, C)),
        lambda: Net(lambda n, x, w: over_channels(n.bn, x @ w), bn=nn.BatchNorm1d(C)), "depends on the inputs",
    ),
    "statistics of the batch": (
        IMAGES,
        lambda: Net(
            lambda n, x: n.bn(n.conv(x)), conv=conv(), bn=nn.BatchNorm2d(C, track_running_stats=False)
        ),
        "the statistics of each batch",
    ),
    "statistics that the call gives": (
        (*IMAGES, draw(C)),
        lambda: Net(lambda n, x, m: F.batch_norm(n.conv(x), m, torch.ones_like(m)), conv=conv()),
        "depend on the inputs of the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fold_channel_affine_refuses(name: str) -> None:
    args, make, reason = REFUSED[name]
    assert_refused(make().double(), args, PASSES, reason)


UNRELATED: dict[str, tuple[tuple[Tensor, ...], Callable[[], Net]]] = {
    "one number": (TOKENS, lambda: Net(lambda n, x: n.a(x) * 0.5, a=linear())),
    "a scale of another tensor": (
        (*TOKENS, draw(C)), lambda: Net(lambda n, x, scale: n.a(x) * scale, a=linear())
    ),
    "a table of positions": (TOKENS, lambda: Net(lambda n, x: n.a(x) * n.scale, a=linear(), scale=torch.ones(9, C))),
    "a bias": (TOKENS, lambda: Net(lambda n, x: n.a(x) + n.shift, a=linear(bias=False), shift=torch.ones(C))),
    "a square": (TOKENS, lambda: Net(lambda n, x: (y := n.a(x)) * y, a=linear())),
    "a scale by channels of one, a shift by those of another axis": (
        (draw(2, C, C),),
        lambda: Net(lambda n, x: torch.relu(x * n.scale) + n.shift, scale=torch.ones(C), shift=torch.ones(C, 1)),
    ),
    "a scaled difference": (
        TOKENS, lambda: Net(lambda n, x: torch.sub(n.a(x), n.shift, alpha=2), a=linear(), shift=torch.ones(C))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNRELATED)
def test_fold_channel_affine_leaves_alone(name: str) -> None:
    args, make = UNRELATED[name]
    assert not fold(make().double(), args, PASSES).replacements


def test_a_batch_norm_in_training_is_kept() -> None:
    net = FIRES["conv and batch norm"][2]().double()
    rewritten: Any = fxopt.rewrite(net.train(), IMAGES, passes=PASSES)
    assert not list(rewritten.folded_weights.buffers())
    (site,) = collect_sites(fold(net, IMAGES, PASSES, frozen=False))
    assert (site.kind, site.status) == ("norm", "kept")
    assert "the statistics of each batch" in site.reason


@torch.no_grad()
def test_changed_statistics_are_folded_anew() -> None:
    net = FIRES["conv and batch norm"][2]().double()
    rewritten: Any = fxopt.rewrite(net, IMAGES, passes=PASSES)
    randomise(net, 3)
    rewritten.load_state_dict(net.state_dict())
    torch.testing.assert_close(rewritten(*IMAGES), net(*IMAGES), rtol=EXACT, atol=EXACT)
    for module in (net, rewritten):
        module.bn.running_mean.add_(1)
    torch.testing.assert_close(rewritten(*IMAGES), net(*IMAGES), rtol=EXACT, atol=EXACT)


@torch.no_grad()
def test_a_fold_that_omits_alpha_times_bias_would_be_found() -> None:
    """What `test_the_bias_of_the_layer_is_scaled_by_alpha_too` tells apart."""
    net = _rep_net().double()
    slope = net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt()
    weight = net.conv.weight * (slope + net.alpha)[:, None, None, None]
    bias = slope * (net.conv.bias - net.bn.running_mean) + net.bn.bias
    wrong = F.conv2d(IMAGES[0], weight, bias, stride=2).flatten(2).transpose(1, 2)
    assert (wrong - net(*IMAGES)).abs().max() > 1e9 * EXACT


def test_the_pass_is_part_of_the_exact_pipeline() -> None:
    assert FoldChannelAffine() in fxopt.passes.exact_pipeline()
