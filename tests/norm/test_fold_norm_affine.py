"""The pass `fold-norm-affine`: norms whose weights move into what reads them, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt.passes.norm.fold_norm_affine import FoldNormAffine
from fxopt.report.sites import collect_sites
from tests.norm.support import EXACT, Net, assert_exact, assert_folds, assert_refused, draw, fold

C, OUT = 8, 6
PASSES = ["fold-norm-affine"]
TOKENS = (draw(2, 16, C),)


def layer_norm(**options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(C, **options)


def linear(out: int = OUT, **options: Any) -> nn.Linear:
    return nn.Linear(C, out, **options)


def _windows(net: Any, x: Tensor) -> Any:
    """Swin: the tokens as an image, rolled and cut into windows."""
    image = net.norm(x).view(2, 4, 4, C)
    image = torch.roll(image, (-1, -1), (1, 2))
    windows = image.view(2, 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)
    return net.a(windows)


def _by_hand(net: Any, x: Tensor) -> Any:
    """RMSNorm as Llama writes it."""
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return net.a(net.weight * normal.to(x.dtype))


def _merged(net: Any, x: Tensor) -> Any:
    """Swin's patch merging: a norm over four joined patches, a reduction without bias."""
    image = x.view(2, 4, 4, C)
    parts = [image[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return net.a(net.norm(torch.cat(parts, -1).view(2, -1, 4 * C)))


FIRES: dict[str, Callable[[], Net]] = {
    "one layer": lambda: Net(lambda n, x: n.a(n.norm(x)), norm=layer_norm(), a=linear()),
    "a bias is made": lambda: Net(lambda n, x: n.a(n.norm(x)), norm=layer_norm(), a=linear(bias=False)),
    "a bias is added apart": lambda: Net(
        lambda n, x: n.a(n.norm(x)).relu(), norm=layer_norm(), a=linear(1096, bias=False)
    ),
    "norm without bias": lambda: Net(lambda n, x: n.a(n.norm(x)), norm=layer_norm(bias=False), a=linear()),
    "rms_norm": lambda: Net(lambda n, x: n.a(n.norm(x)), norm=nn.RMSNorm(C), a=linear(bias=False)),
    "rms_norm by hand": lambda: Net(_by_hand, weight=torch.ones(C), a=linear()),
    "weight made of a weight": lambda: Net(
        lambda n, x: n.a(F.rms_norm(x, (C,), 1 + n.weight)), weight=torch.ones(C), a=linear()
    ),
    "queries, keys and values of groups": lambda: Net(
        lambda n, x: tuple(layer(y) for y in [n.norm(x)] for layer in (n.q, n.k, n.v)),
        norm=layer_norm(), q=linear(16, bias=False), k=linear(4), v=linear(4, bias=False),
    ),
    "one layer read twice": lambda: Net(
        lambda n, x: n.a(n.norm(x)) + n.a(n.norm(x).roll(1, 1)), norm=layer_norm(), a=linear()
    ),
    "channels first and back": lambda: Net(
        lambda n, x: n.a(n.norm(x).transpose(1, 2).flip(2).mT), norm=layer_norm(), a=linear()
    ),
    "windows": lambda: Net(_windows, norm=layer_norm(), a=linear()),
    "patch merging": lambda: Net(_merged, norm=nn.LayerNorm(4 * C), a=nn.Linear(4 * C, OUT, bias=False)),
    "class token": lambda: Net(lambda n, x: n.a(n.norm(x)[:, 0]), norm=layer_norm(), a=linear()),
    "gathered tokens": lambda: Net(
        lambda n, x: n.a(n.norm(x)[:, torch.tensor([[1, 3], [0, 2]])]), norm=layer_norm(), a=linear()
    ),
    "split tokens": lambda: Net(
        lambda n, x: [layer(y) for layer, y in zip((n.a, n.b), n.norm(x).split([5, 11], 1), strict=True)],
        norm=layer_norm(), a=linear(), b=linear(3),
    ),
    "mean and head": lambda: Net(lambda n, x: n.a(n.norm(x).mean(1)), norm=layer_norm(), a=linear()),
    "pool and head": lambda: Net(
        lambda n, x: n.a(F.adaptive_avg_pool1d(n.norm(x).transpose(1, 2), 1).flatten(1)),
        norm=layer_norm(), a=linear(),
    ),
    "sum without a shift": lambda: Net(
        lambda n, x: n.a(n.norm(x).sum(1)), norm=layer_norm(bias=False), a=linear(64)
    ),
    "addmm": lambda: Net(lambda n, x: n.a(n.norm(x)), norm=layer_norm(), a=Conv1D(OUT, C)),  # type: ignore[no-untyped-call]
    "matmul": lambda: Net(lambda n, x: n.norm(x) @ n.a, norm=layer_norm(), a=torch.ones(C, OUT)),
    "convolution": lambda: Net(
        lambda n, x: n.a(n.norm(x).mT.unflatten(2, (4, 4))), norm=layer_norm(), a=nn.Conv2d(C, OUT, 2)
    ),
    "convolution in groups": lambda: Net(
        lambda n, x: n.a(n.norm(x).mT), norm=layer_norm(), a=nn.Conv1d(C, 2 * OUT, 3, groups=4, bias=False)
    ),
    "zeros around no shift": lambda: Net(
        lambda n, x: n.a(F.pad(n.norm(x), (0, 0, 1, 2))), norm=nn.RMSNorm(C), a=linear()
    ),
    "padded convolution without a shift": lambda: Net(
        lambda n, x: n.a(n.norm(x).mT), norm=layer_norm(bias=False), a=nn.Conv1d(C, OUT, 3, padding=1)
    ),
    "padding by nothing": lambda: Net(
        lambda n, x: n.a(F.pad(n.norm(x), (0, 0, 0, 0))), norm=layer_norm(), a=linear()
    ),
    "reflected borders": lambda: Net(
        lambda n, x: n.a(F.pad(n.norm(x).mT, (1, 1), mode="reflect")), norm=layer_norm(), a=nn.Conv1d(C, OUT, 3)
    ),
    "equal sizes": lambda: Net(
        lambda n, x: n.a(n.norm(x[:, :C]).view(2, C, C)), norm=layer_norm(), a=linear(C, bias=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_fold_norm_affine_fires(name: str) -> None:
    sites = 2 if name == "one layer read twice" else 1
    result = assert_folds(FIRES[name](), TOKENS, PASSES, sites)
    found = [site for site in collect_sites(result) if site.kind == "norm"]
    assert [site.rule for site in found] == ["norm-affine"] * sites
    assert all(site.status == "rewritten" for site in found)


def test_report_says_what_became_of_a_norm() -> None:
    result = fold(FIRES["queries, keys and values of groups"](), TOKENS, PASSES)
    (site,) = collect_sites(result)
    assert site.reason == "weight and bias moved into 3 linear layers (2 get a bias)"


@pytest.mark.parametrize(
    ("out", "dtype", "apart"),
    [
        (1096, torch.bfloat16, True),
        (1096, torch.float64, False),
        (1088, torch.bfloat16, False),
        (1000, torch.bfloat16, False),
    ],
)
def test_a_bias_that_is_new_is_added_apart_where_inductor_pads_rows(out: int, dtype: torch.dtype, apart: bool) -> None:
    net = Net(lambda n, x: n.a(n.norm(x)), norm=layer_norm(), a=linear(out, bias=False)).to(dtype).eval()
    rewritten: Any = fxopt.rewrite(net, (TOKENS[0].to(dtype),), passes=PASSES)
    with torch.no_grad():
        (layer,) = rewritten.program().graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert (len(layer.args) < 3 or layer.args[2] is None) is apart
    assert rewritten.folded_weights.a_weight.shape == (out, C)


def test_a_bias_that_was_there_stays_in_its_layer() -> None:
    net = Net(lambda n, x: n.a(n.norm(x)), norm=layer_norm(), a=linear(1096)).bfloat16().eval()
    rewritten: Any = fxopt.rewrite(net, (TOKENS[0].bfloat16(),), passes=PASSES)
    with torch.no_grad():
        (layer,) = rewritten.program().graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert layer.args[2] is not None


def _shared(net: Any, x: Tensor) -> Any:
    return x + net.b(torch.relu(net.a(net.norm(x + net.b(torch.relu(net.a(net.norm(x))))))))


def _tied(net: Any, ids: Tensor) -> Any:
    return F.linear(net.norm(net.embedding(ids)), net.embedding.weight)


def _two_norms(net: Any, x: Tensor) -> Any:
    return net.a(net.norm(x)) * net.a(net.other(x))


def test_shared_norms_and_layers_are_folded_where_they_are_used() -> None:
    """As in ALBERT; the shared weights themselves stay, folded copies that are equal are one."""
    net = Net(_shared, norm=layer_norm(), a=linear(), b=nn.Linear(OUT, C))
    assert_folds(net, TOKENS, PASSES, 2)
    rewritten: Any = fxopt.rewrite(net.double(), TOKENS, passes=PASSES)
    assert [name for name, _ in rewritten.folded_weights.named_buffers()] == ["a_weight", "a_bias"]


def test_one_layer_behind_two_norms_has_two_folded_weights() -> None:
    net = Net(_two_norms, norm=layer_norm(), other=layer_norm(), a=linear())
    assert_folds(net, TOKENS, PASSES, 2)
    rewritten: Any = fxopt.rewrite(net.double(), TOKENS, passes=PASSES)
    names = [name for name, _ in rewritten.folded_weights.named_buffers()]
    assert names == ["a_weight", "a_bias", "a_weight_1", "a_bias_1"]


def test_tied_embedding_is_not_touched() -> None:
    net = Net(_tied, embedding=nn.Embedding(11, C), norm=layer_norm())
    assert_folds(net, (torch.arange(10).view(2, 5),), PASSES)


@pytest.mark.parametrize("where", [0, 3, C - 1])
def test_scale_of_zero(where: int) -> None:
    net = FIRES["one layer"]()
    with torch.no_grad():
        net.norm.weight[where] = 0.0
    assert_folds(net, TOKENS, PASSES)


def test_all_scales_zero() -> None:
    net = FIRES["a bias is made"]()
    torch.nn.init.zeros_(net.norm.weight)
    assert_folds(net, TOKENS, PASSES)


def test_dynamic_sizes() -> None:
    net = FIRES["channels first and back"]().double()
    batch, length = Dim("batch", min=2), Dim("length", min=2)
    shapes = (({0: batch, 1: length},),)
    rewritten: Any = fxopt.rewrite(net, TOKENS, passes=PASSES, dynamic_shapes=shapes, strict=True)
    for x in (draw(2, 16, C), draw(5, 3, C)):
        assert_exact(rewritten, net, (x,))


def _mixed(net: Any, x: Tensor) -> Any:
    """Llama in bfloat16 with weights of the norm in float32."""
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return net.a((net.weight * normal.to(x.dtype)).to(torch.bfloat16))


@torch.no_grad()
def test_weights_of_other_dtypes_than_the_layer() -> None:
    net = Net(_mixed, weight=torch.ones(C), a=linear().bfloat16())
    x = draw(2, 16, C, dtype=torch.bfloat16)
    rewritten: Any = fxopt.rewrite(net, (x,), passes=PASSES, verify="numeric", strict=True)
    assert rewritten.folded_weights.a_weight.dtype == torch.bfloat16
    wide = (net.a.weight.double() * net.weight.double()).bfloat16()
    assert torch.equal(rewritten.folded_weights.a_weight, wide)


REFUSED: dict[str, tuple[Callable[[], Net], str]] = {
    "returned": (
        lambda: Net(lambda n, x: (n.a(y := n.norm(x)), y), norm=layer_norm(), a=linear()), "also a result of the model",
    ),
    "returned after a move": (
        lambda: Net(lambda n, x: (n.a(y := n.norm(x)), y.mT), norm=layer_norm(), a=linear()),
        "also a result of the model",
    ),
    "post-norm": (
        lambda: Net(lambda n, x: (y := n.norm(x)) + n.a(y), norm=layer_norm(), a=linear(C)),
        "aten.add at",
    ),
    "not linear": (
        lambda: Net(lambda n, x: n.a(torch.relu(n.norm(x))), norm=layer_norm(), a=linear()), "aten.relu at",
    ),
    "maximum over tokens": (
        lambda: Net(lambda n, x: n.a(n.norm(x).amax(1)), norm=layer_norm(), a=linear()), "aten.amax at",
    ),
    "sum of shifts": (
        lambda: Net(lambda n, x: n.a(n.norm(x).sum(1)), norm=layer_norm(), a=linear()), "a sum lies between",
    ),
    "joined with a class token": (
        lambda: Net(
            lambda n, x: n.a(torch.cat((n.token.expand(2, 1, C), n.norm(x)), 1)),
            norm=layer_norm(), a=linear(), token=torch.ones(1, 1, C),
        ),
        "aten.cat at",
    ),
    "zero padding": (
        lambda: Net(lambda n, x: n.a(F.pad(n.norm(x), (0, 0, 0, 3))), norm=layer_norm(), a=linear()),
        "zero padding lies between",
    ),
    "padding with ones": (
        lambda: Net(lambda n, x: n.a(F.pad(n.norm(x), (0, 0, 0, 3), value=1.0)), norm=nn.RMSNorm(C), a=linear()),
        "padding with 1.0 lies between",
    ),
    "padded channels": (
        lambda: Net(lambda n, x: n.a(F.pad(n.norm(x), (0, 2))), norm=nn.RMSNorm(C), a=nn.Linear(C + 2, OUT)),
        "adds channels",
    ),
    "padded windows": (
        lambda: Net(
            lambda n, x: n.a(F.pad(n.norm(x).view(2, 4, 4, C), (0, 0, 0, 2, 0, 2)).view(2, 2, 3, 2, 3, C)),
            norm=layer_norm(), a=linear(),
        ),
        "zero padding lies between",
    ),
    "padded convolution": (
        lambda: Net(lambda n, x: n.a(n.norm(x).mT), norm=layer_norm(), a=nn.Conv1d(C, OUT, 3, padding=1)),
        "pads with zeros",
    ),
    "padding of the same size": (
        lambda: Net(lambda n, x: n.a(n.norm(x).mT), norm=layer_norm(), a=nn.Conv1d(C, OUT, 3, padding="same")),
        "is no linear layer",
    ),
    "transposed convolution": (
        lambda: Net(lambda n, x: n.a(n.norm(x).mT), norm=layer_norm(), a=nn.ConvTranspose1d(C, OUT, 3)),
        "is no linear layer",
    ),
    "tokens as channels": (
        lambda: Net(lambda n, x: n.a(n.norm(x).mT), norm=layer_norm(), a=nn.Linear(16, OUT)),
        "does not read its channels as channels",
    ),
    "equal sizes, tokens as channels": (
        lambda: Net(lambda n, x: n.a(n.norm(x[:, :C]).mT), norm=layer_norm(), a=linear()),
        "does not read its channels as channels",
    ),
    "convolution over the channels": (
        lambda: Net(lambda n, x: n.a(n.norm(x)), norm=layer_norm(), a=nn.Conv1d(16, OUT, 3)),
        "does not read its channels as channels",
    ),
    "joined tokens": (
        lambda: Net(lambda n, x: n.a(n.norm(x).view(2, 8, 2 * C)), norm=layer_norm(), a=nn.Linear(2 * C, OUT)),
        "splits or joins the channels",
    ),
    "split channels": (
        lambda: Net(lambda n, x: n.a(n.norm(x).view(2, 32, 4)), norm=layer_norm(), a=nn.Linear(4, OUT)),
        "splits or joins the channels",
    ),
    "some channels": (
        lambda: Net(lambda n, x: n.a(n.norm(x)[..., :4]), norm=layer_norm(), a=nn.Linear(4, OUT)),
        "takes some of the channels only",
    ),
    "rolled channels": (
        lambda: Net(lambda n, x: n.a(n.norm(x).roll(1, -1)), norm=layer_norm(), a=linear()),
        "moves channels into each other's place",
    ),
    "mean over channels": (
        lambda: Net(lambda n, x: n.a(n.norm(x).mean(-1)), norm=layer_norm(), a=nn.Linear(16, OUT)),
        "runs over the channels",
    ),
    "two axes": (
        lambda: Net(lambda n, x: n.a(n.norm(x)), norm=nn.LayerNorm((16, C)), a=linear()),
        "normalises over 2 axes together",
    ),
    "weight of the layer from the inputs": (
        lambda: Net(lambda n, x: F.linear(n.norm(x), x[0]), norm=layer_norm()), "depends on the inputs",
    ),
    "weight of the norm from the inputs": (
        lambda: Net(lambda n, x: n.a(F.layer_norm(x, (C,), n.b(x[0, 0]))), a=linear(), b=linear(C)),
        "depends on the inputs of the model",
    ),
    "read by its own weight": (
        lambda: Net(lambda n, x: (y := n.norm(x)[0]) @ y.mT, norm=layer_norm()), "depends on the inputs",
    ),
    "one output without an axis": (
        lambda: Net(lambda n, x: F.linear(n.norm(x), n.a), norm=layer_norm(), a=torch.ones(C)), "is no linear layer",
    ),
    "weight on the left": (
        lambda: Net(lambda n, x: n.a @ n.norm(x), norm=layer_norm(), a=torch.ones(16, 16)), "is no linear layer",
    ),
    "weights of each sample": (
        lambda: Net(lambda n, x: n.norm(x) @ n.a, norm=layer_norm(), a=torch.ones(2, C, OUT)), "is no linear layer",
    ),
    "dropped": (
        lambda: Net(lambda n, x: n.a(F.dropout(n.norm(x), 0.5, True)), norm=layer_norm(), a=linear()),
        "dropout lies between",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fold_norm_affine_refuses(name: str) -> None:
    make, reason = REFUSED[name]
    assert_refused(make().double(), TOKENS, PASSES, reason)


def test_a_range_too_small_for_products_is_refused() -> None:
    net = FIRES["one layer"]().half()
    assert_refused(net, (draw(2, 16, C, dtype=torch.float16),), PASSES, "torch.float16 may not hold the product")


def test_weights_in_training_are_refused() -> None:
    net = FIRES["one layer"]().double()
    assert_refused(net, TOKENS, PASSES, "may still be trained", frozen=False)
    rewritten: Any = fxopt.rewrite(net.train(), TOKENS, passes=PASSES)
    assert not list(rewritten.folded_weights.buffers())


def test_weights_of_a_compiled_graph_are_refused() -> None:
    net = FIRES["one layer"]()
    (site,) = fxopt.explain(net, draw(2, 16, C, dtype=torch.float32)).sites
    assert (site.kind, site.status) == ("norm", "kept")
    assert "in a compiled graph weights are inputs" in site.reason
    net = FIRES["one layer"]()
    post = Net(lambda n, x: (y := n.norm(x)) + n.a(y), norm=layer_norm(), a=linear(C))
    (site,) = fxopt.explain(post, draw(2, 16, C, dtype=torch.float32)).sites
    assert "aten.add at" in site.reason, "what would also stand against it elsewhere is said first"


def test_zero_padding_would_have_been_wrong() -> None:
    """What the refusal is for: padded tokens become the shift instead of 0."""
    net = Net(lambda n, x: n.a(F.pad(n.norm(x), (0, 0, 0, 3))), norm=layer_norm(), a=linear()).double()
    weight, bias = net.a.weight * net.norm.weight, net.a.bias + net.a.weight @ net.norm.bias
    wrong = F.linear(F.pad(F.layer_norm(TOKENS[0], (C,)), (0, 0, 0, 3)), weight, bias)
    assert (wrong - net(*TOKENS)).abs().max() > 1e3 * EXACT


def test_the_pass_is_part_of_the_exact_pipeline() -> None:
    assert FoldNormAffine() in fxopt.passes.exact_pipeline()
