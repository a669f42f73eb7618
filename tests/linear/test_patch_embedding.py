"""The pass `patch-embedding`: convolutions that cut patches, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

from fxopt.passes.linear.patch_embedding import PatchEmbedding
from fxopt.report.sites import collect_sites
from tests.canonical.support import DTYPES, Dynamic, assert_fires, assert_kept, assert_same, random, rewrite

B, C, OUT, P = 2, 3, 8, 4
LINEAR = {"aten.linear": 1, "aten.conv1d": 0, "aten.conv2d": 0, "aten.conv3d": 0, "aten.convolution": 0}
IN_PLACE = LINEAR | {"aten.clone": 0}
COPIED = LINEAR | {"aten.clone": 1}


def _args(*sizes: int, kernel: tuple[int, ...] = (P, P), dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (
        random(*(sizes or (B, C, 4 * P, 5 * P)), dtype=dtype),
        random(OUT, C, *kernel, dtype=dtype, seed=1, scale=0.2),
        random(OUT, dtype=dtype, seed=2),
    )


def _tokens(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What ViT does with its patches."""
    return F.layer_norm(F.conv2d(image, weight, bias, stride=P).flatten(2).transpose(1, 2), (OUT,))


def _normalised(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The convolution, and a norm over channels, whose result is laid out alike whatever the strides of its operand."""
    return lambda *args: F.layer_norm(convolve(*args).movedim(1, -1), (OUT,))


SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=P), (B, C, 8, 12), (P, P)),
    "conv2d oblong": (lambda x, w, b: F.conv2d(x, w, b, stride=(2, 6)), (B, C, 8, 12), (2, 6)),
    "conv2d along one axis": (lambda x, w, b: F.conv2d(x, w, b, stride=(1, 3)), (B, C, 8, 12), (1, 3)),
    "conv2d valid": (lambda x, w, b: F.conv2d(x, w, b, stride=P, padding="valid"), (B, C, 8, 12), (P, P)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=5), (B, C, 15), (5,)),
    "conv1d valid": (lambda x, w, b: F.conv1d(x, w, b, stride=5, padding="valid"), (B, C, 15), (5,)),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, stride=(2, 3, 4)), (B, C, 4, 6, 8), (2, 3, 4)),
    "convolution": (
        lambda x, w, b: torch.convolution(x, w, b, [P, P], [0, 0], [1, 1], False, [0, 0], 1), (B, C, 8, 12), (P, P),
    ),
    "cropped": (lambda x, w, b: F.conv2d(x, w, b, stride=P), (B, C, 11, 14), (P, P)),
    "one patch": (lambda x, w, b: F.conv2d(x, w, b, stride=P), (B, C, P, P), (P, P)),
    "equal sizes": (lambda x, w, b: F.conv2d(x, w, b, stride=C), (C, C, C * C, C * C), (C, C)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_patch_embedding_fires(name: str, dtype: torch.dtype) -> None:
    convolve, image, kernel = SPELLINGS[name]
    done = assert_fires(_normalised(convolve), _args(*image, kernel=kernel, dtype=dtype), PatchEmbedding(), IN_PLACE)
    assert (done.site.kind, done.site.status) == ("linear", "rewritten")


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embedding_makes_tokens_without_moving_a_number(dtype: torch.dtype) -> None:
    args = _args(dtype=dtype)
    assert_fires(_tokens, args, PatchEmbedding(), IN_PLACE)
    graph = rewrite(_tokens, args, PatchEmbedding()).program.graph
    (tokens,) = graph.find_nodes(op="call_function", target=torch.ops.aten.transpose.int)
    assert tokens.meta["val"].is_contiguous(), "the metadata downstream is that of the new strides"
    tap: list[Tensor] = []
    _linear_and_tokens(graph, tap)(*args)
    assert tap[0].data_ptr() == tap[1].data_ptr() and tap[1].is_contiguous()


def _linear_and_tokens(graph: torch.fx.Graph, tap: list[Tensor]) -> Callable[..., Any]:
    """Runs ``graph`` and puts what the linear layer and the last transposition give into ``tap``."""

    class Tapped(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.target in (torch.ops.aten.linear.default, torch.ops.aten.transpose.int):
                tap.append(value)
            return value

    return Tapped(torch.fx.GraphModule({}, graph)).run


def test_patch_embedding_fires_without_bias_or_batch() -> None:
    image, weight, _ = _args()
    assert_fires(lambda x, w: F.conv2d(x, w, stride=P).amax(1), (image, weight), PatchEmbedding(), IN_PLACE)
    assert_fires(
        lambda x, w: F.conv2d(x, w, stride=P).amax(0), (image.detach()[0].clone(), weight), PatchEmbedding(), IN_PLACE
    )


def test_patch_embedding_fires_without_a_gradient() -> None:
    args = tuple(x.detach() for x in _args())
    assert_fires(_tokens, args, PatchEmbedding(), IN_PLACE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_embedding_keeps_channels_last(dtype: torch.dtype) -> None:
    """A channels-last result is laid out as the linear layer gives it; a channels-last weight is not copied either."""
    image, weight, bias = _args(dtype=dtype)
    image, weight = (_channels_last(x) for x in (image, weight))

    def convolve(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, stride=P)

    assert_fires(convolve, (image, weight, bias), PatchEmbedding(), IN_PLACE)
    result = rewrite(convolve, (image, weight, bias), PatchEmbedding())
    given = result.program.module(image, weight, bias)[0]
    assert given.stride() == convolve(image, weight, bias).stride()
    flat = result.program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0].args[1]
    assert flat.meta["val"].is_contiguous() and flat.meta["val"]._is_view()


def _channels_last(x: Tensor) -> Tensor:
    return x.detach().to(memory_format=torch.channels_last).requires_grad_()


VIEWED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda y: y.view(y.shape[0], -1).relu(),
    "view after a pointwise operation": lambda y: (y * 2).view(y.shape[0], -1).relu(),
    "output": lambda y: y,
    "view as output": lambda y: y.flatten(2),
    "as_strided": lambda y: y.as_strided((2, 3), (3, 1)).relu(),
}


@pytest.mark.parametrize("name", VIEWED)
def test_patch_embedding_copies_where_the_strides_matter(name: str) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return VIEWED[name](F.conv2d(x, w, b, stride=P))

    args = _args()
    assert_fires(function, args, PatchEmbedding(), COPIED)
    assert rewrite(function, args, PatchEmbedding()).program.module(*args)[0].stride() == function(*args).stride()


@torch.library.custom_op("fxopt_tests::first_of_storage", mutates_args=())
def _first_of_storage(x: Tensor) -> Tensor:
    """The second number in memory: an operator that reads by address."""
    return x.as_strided((1,), (1,), 1).clone()


@_first_of_storage.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(1)


def test_patch_embedding_copies_for_an_operator_outside_aten() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = _first_of_storage(F.conv2d(x, w, stride=P))
        return result

    assert_fires(function, tuple(x.detach() for x in _args()[:2]), PatchEmbedding(), COPIED)


def test_patch_embedding_decides_each_site_alone() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _tokens(x, w, b), F.conv2d(x, w, b, stride=P).view(B, -1).relu()

    assert_fires(function, _args(), PatchEmbedding(), {"aten.linear": 2, "aten.conv2d": 0, "aten.clone": 1})


def test_patch_embedding_fires_on_a_chain() -> None:
    """ConvNeXt and Swin merge patches of patches."""

    def function(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return F.layer_norm(F.conv2d(F.gelu(F.conv2d(x, w, b, stride=P)), v, stride=2).movedim(1, -1), (5,))

    args = (*_args(B, C, 4 * P, 6 * P), random(5, OUT, 2, 2, seed=3, scale=0.2))
    counts = {"aten.linear": 2, "aten.conv2d": 0, "aten.clone": 0}
    assert_fires(function, args, PatchEmbedding(), counts, terms=B * 4 * 6)


_grid = _normalised(lambda x, w, b: F.conv2d(x, w, b, stride=P))
BATCH, HEIGHT, WIDTH = Dim("batch", min=1, max=64), Dim("height", min=2 * P, max=512), Dim("width", min=2 * P, max=512)
DYNAMIC: dict[str, tuple[Callable[..., Tensor], Dynamic, tuple[int, ...]]] = {
    "batch": (_tokens, ({0: BATCH}, None, None), (5, C, 4 * P, 5 * P)),
    "batch of one": (_tokens, ({0: BATCH}, None, None), (1, C, 4 * P, 5 * P)),
    "height": (_grid, ({2: HEIGHT}, None, None), (B, C, 27, 5 * P)),
    "height in patches": (_grid, ({2: 4 * Dim("rows", min=2, max=99)}, None, None), (B, C, 28, 5 * P)),
    "everything": (_tokens, ({0: BATCH, 2: HEIGHT, 3: WIDTH}, None, None), (3, C, 9, 31)),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_patch_embedding_fires_on_dynamic_shapes(name: str) -> None:
    function, dynamic, sizes = DYNAMIC[name]
    result = rewrite(function, _args(), PatchEmbedding(), dynamic)
    assert len(result.replacements) == 1
    slices = result.program.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
    assert bool(slices) == (name in ("height", "everything")), "cropped only where it may be needed"
    assert_same(result.program.module, lambda *args: (function(*args),), _args(*sizes))


def _convolution(**options: Any) -> Callable[..., Tensor]:
    return lambda x, w, b: F.conv2d(x, w, b, **options)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_convolution(stride=(P, P - 1)), "the stride (4, 3) is not the kernel size (4, 4)"),
        (_convolution(stride=(P + 1, P)), "the stride (5, 4) is not the kernel size (4, 4)"),
        (_convolution(stride=P, padding=1), "the padding (1, 1) shifts the patches"),
        (_convolution(stride=P, padding=(0, 2)), "the padding (0, 2) shifts the patches"),
        (_convolution(stride=P, dilation=2), "the dilation (2, 2) leaves gaps"),
        (lambda x, w, b: F.conv2d(x[:, :2], w[:, :1], b, stride=P, groups=2), "its 2 groups of channels"),
    ],
)
def test_patch_embedding_rejects(function: Callable[..., Tensor], reason: str) -> None:
    miss = assert_kept(function, _args(), PatchEmbedding(), reason)
    assert miss.site is not None and miss.site.kind == "linear"
    sites = collect_sites(rewrite(function, _args(), PatchEmbedding()))
    assert [(site.kind, site.status, site.rule) for site in sites] == [("linear", "kept", "patches")]
    assert reason in sites[0].reason


IGNORED: dict[str, Callable[..., Tensor]] = {
    "stride 1": _convolution(stride=1),
    "other stride": _convolution(stride=2, padding=1),
    "same": lambda x, w, b: F.conv2d(x, w[..., :3, :3], b, padding="same"),
    "pointwise": lambda x, w, b: F.conv2d(x, w[..., :1, :1], b),
    "transposed": lambda x, w, b: F.conv_transpose2d(x, w.transpose(0, 1), b, stride=P),
}


@pytest.mark.parametrize("name", IGNORED)
def test_patch_embedding_says_nothing_of_other_convolutions(name: str) -> None:
    result = rewrite(IGNORED[name], _args(), PatchEmbedding())
    assert not result.replacements and not result.near_misses
    assert collect_sites(result) == ()


def test_patch_embedding_ignores_a_transposed_convolution_of_patches() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.convolution(x, w, None, [P, P], [0, 0], [1, 1], True, [0, 0], 1)

    result = rewrite(function, (random(B, OUT, 3, 3), random(OUT, C, P, P)), PatchEmbedding())
    assert not result.replacements and not result.near_misses and collect_sites(result) == ()


def test_patch_embedding_is_idempotent() -> None:
    assert not PatchEmbedding().run(rewrite(_tokens, _args(), PatchEmbedding()).program).modified
