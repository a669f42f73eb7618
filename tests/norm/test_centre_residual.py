"""The pass `centre-residual`: streams that every reader sees through a LayerNorm, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fxopt
from fxopt.passes.norm.centre_residual import CentreResidual
from tests.norm.support import EXACT, Net, assert_folds, assert_refused, draw, fold

C, OUT, LENGTH = 8, 6, 9
PASSES = ["centre-residual"]
IDS = (torch.arange(2 * LENGTH).view(2, LENGTH) % 11,)
TOKENS = (draw(2, LENGTH, OUT),)
IMAGES = (draw(2, 3, 6, 6),)


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(C, C, **options)


def norm(**options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(C, **options)


def _stream(net: Any, x: Tensor) -> Any:
    """A pre-norm block of two layers."""
    x = x + net.a(torch.relu(net.first(x)))
    x = x + net.b(torch.tanh(net.second(x)))
    return net.last(x).square()


def stream(start: Callable[[Any, Tensor], Tensor], **parts: Any) -> Net:
    return Net(
        lambda n, x: _stream(n, start(n, x)), a=linear(), b=linear(bias=False), first=norm(), second=norm(),
        last=norm(bias=False), **parts,
    )  # fmt: skip


def _class_token(net: Any, x: Tensor) -> Any:
    tokens = net.conv(x).flatten(2).transpose(1, 2)
    return torch.cat((net.token.expand(2, -1, -1), tokens), 1) + net.places


def _head(net: Any, ids: Tensor) -> Any:
    x = net.table(ids)
    x = x + net.a(torch.relu(net.first(x)))
    return F.linear(net.last(x), net.table.weight)


#: How many norms become RMSNorms, the arguments, and the model.
FIRES: dict[str, tuple[int, tuple[Tensor, ...], Callable[[], Net]]] = {
    "embedding": (3, IDS, lambda: stream(lambda n, x: n.table(x), table=nn.Embedding(11, C))),
    "embedding and positions": (
        3, IDS,
        lambda: stream(
            lambda n, x: n.table(x) + n.places(torch.arange(LENGTH)),
            table=nn.Embedding(11, C), places=nn.Embedding(16, C),
        ),
    ),
    "scaled embedding": (3, IDS, lambda: stream(lambda n, x: n.table(x) * 3.0, table=nn.Embedding(11, C))),
    "positions as they are": (
        3, TOKENS, lambda: stream(lambda n, x: n.c(x) + n.places, c=nn.Linear(OUT, C), places=torch.ones(LENGTH, C)),
    ),
    "patches and a class token": (
        3, IMAGES,
        lambda: stream(
            _class_token, conv=nn.Conv2d(3, C, 2, 2), token=torch.ones(1, 1, C), places=torch.ones(1, 10, C)
        ),
    ),
    "addmm": (
        3, TOKENS,
        lambda: stream(
            lambda n, x: torch.addmm(n.shift, x.view(-1, OUT), n.c).view(2, LENGTH, C),
            c=torch.ones(OUT, C), shift=torch.ones(C),
        ),
    ),
    "matmul and a bias": (
        3, TOKENS, lambda: stream(lambda n, x: x @ n.c + n.shift, c=torch.ones(OUT, C), shift=torch.ones(C)),
    ),
    "mean over tokens before the last norm": (
        1, TOKENS, lambda: Net(lambda n, x: n.last(n.c(x).mean(1)).square(), c=nn.Linear(OUT, C), last=norm()),
    ),
    "rolled and cut into windows": (
        1, TOKENS,
        lambda: Net(
            lambda n, x: n.last(n.c(x).roll(1, 1).view(2, 3, 3, C).transpose(1, 2)).square(),
            c=nn.Linear(OUT, C), last=norm(),
        ),
    ),
    "padded with zeros": (
        1, TOKENS,
        lambda: Net(lambda n, x: n.last(F.pad(n.c(x), (0, 0, 1, 2))).square(), c=nn.Linear(OUT, C), last=norm()),
    ),
    "tied head": (2, IDS, lambda: Net(_head, table=nn.Embedding(11, C), a=linear(), first=norm(), last=norm())),
    "one norm used twice": (
        2, IDS,
        lambda: Net(
            lambda n, x: n.a(n.last(n.table(x))).square() * n.last(n.table(x)), table=nn.Embedding(11, C),
            a=linear(), last=norm(),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_centre_residual_fires(name: str) -> None:
    count, args, make = FIRES[name]
    result = assert_folds(make(), args, PASSES, count)
    assert result.program.operators()["fxopt.rms_norm"] == count
    assert result.program.operators()["aten.layer_norm"] == 0


@torch.no_grad()
def test_no_writer_has_a_mean_and_the_head_keeps_its_own() -> None:
    net = FIRES["tied head"][2]().double()
    rewritten: Any = fxopt.rewrite(net, IDS, passes=PASSES, strict=True)
    folded = dict(rewritten.folded_weights.named_buffers())
    assert set(folded) == {"table_weight", "a_weight", "a_bias"}
    assert folded["table_weight"].mean(-1).abs().max() < EXACT
    assert folded["a_weight"].mean(0).abs().max() < EXACT
    assert folded["a_bias"].mean().abs() < EXACT
    assert torch.equal(rewritten.table.weight, net.table.weight)


def test_together_with_the_other_folds() -> None:
    """What is left of a block: RMSNorms without weights, and layers."""
    net = Net(
        lambda n, x: n.b(n.first((y := n.table(x)) + n.a(torch.relu(n.c(n.first(y)))) * n.scale)),
        table=nn.Embedding(11, C), first=norm(), a=linear(), b=linear(), c=linear(), scale=torch.ones(C),
    )  # fmt: skip
    passes = ["fold-norm-affine", "fold-channel-affine", "centre-residual"]
    result = assert_folds(net, IDS, passes, 5)
    norms = result.program.graph.find_nodes(op="call_function", target=torch.ops.fxopt.rms_norm.default)
    assert [node.args[2] for node in norms] == [None, None]


def _post_norm(net: Any, x: Tensor) -> Any:
    x = net.first(x)
    return net.last(x + net.a(x)).square()


REFUSED: dict[str, tuple[tuple[Tensor, ...], Callable[[], Net], str]] = {
    "the input of the model": (
        (draw(2, LENGTH, C),), lambda: stream(lambda n, x: x), "writes into the stream and can't be centred",
    ),
    "returned": (
        IDS,
        lambda: Net(lambda n, x: (y := n.table(x), n.last(y)), table=nn.Embedding(11, C), last=norm()),
        "also a result of the model",
    ),
    "read without a norm": (
        IDS,
        lambda: Net(lambda n, x: n.last(y := n.table(x)) * n.a(y), table=nn.Embedding(11, C), last=norm(), a=linear()),
        "reads the stream without a LayerNorm",
    ),
    "read through an RMSNorm": (
        IDS,
        lambda: Net(
            lambda n, x: n.last(y := n.table(x)) * n.rms(y), table=nn.Embedding(11, C), last=norm(), rms=nn.RMSNorm(C)
        ),
        "reads the stream without a LayerNorm",
    ),
    "read through a norm over two axes": (
        IDS,
        lambda: Net(
            lambda n, x: n.last(y := n.table(x)) * n.both(y),
            table=nn.Embedding(11, C), last=norm(), both=nn.LayerNorm((LENGTH, C)),
        ),
        "reads the stream without a LayerNorm",
    ),
    "read by an activation": (
        IDS,
        lambda: Net(lambda n, x: n.last(torch.relu(n.table(x))).square(), table=nn.Embedding(11, C), last=norm()),
        "aten.relu at",
    ),
    "post-norm": (
        (draw(2, LENGTH, C),), lambda: Net(_post_norm, first=norm(), last=norm(), a=linear()),
        "aten.layer_norm at",
    ),
    "scaled by channel": (
        TOKENS,
        lambda: Net(
            lambda n, x: n.last(n.c(x) * n.scale).square(), c=nn.Linear(OUT, C), scale=torch.ones(C), last=norm()
        ),
        "aten.mul at",
    ),
    "a number added": (
        TOKENS, lambda: Net(lambda n, x: n.last(n.c(x) + 1.0).square(), c=nn.Linear(OUT, C), last=norm()),
        "writes into the stream and can't be centred",
    ),
    "a term for all channels": (
        TOKENS,
        lambda: Net(
            lambda n, x: n.last(n.c(x) + n.term).square(), c=nn.Linear(OUT, C), term=torch.ones(LENGTH, 1), last=norm()
        ),
        "writes into the stream and can't be centred",
    ),
    "padded with ones": (
        TOKENS,
        lambda: Net(
            lambda n, x: n.last(F.pad(n.c(x), (0, 0, 1, 2), value=1.0)).square(), c=nn.Linear(OUT, C), last=norm()
        ),
        "aten.pad at",
    ),
    "heads": (
        TOKENS,
        lambda: Net(lambda n, x: n.last(n.c(x).view(2, LENGTH, 2, 4)).square(), c=nn.Linear(OUT, C),
                    last=nn.LayerNorm(4)),
        "can't be centred",
    ),
    "tokens as channels": (
        (draw(2, C, OUT),), lambda: Net(lambda n, x: n.last(n.c(x).mT).square(), c=nn.Linear(OUT, C), last=norm()),
        "does not write its channels as channels",
    ),
    "groups": (
        IMAGES,
        lambda: Net(
            lambda n, x: n.last(n.conv(x).movedim(1, -1)).square(), conv=nn.Conv2d(3, 6, 3, groups=3),
            last=nn.LayerNorm(6),
        ),
        "3 groups write channels from inputs of their own",
    ),
    "a written weight from the inputs": (
        (*TOKENS, draw(OUT, C)), lambda: Net(lambda n, x, w: n.last(x @ w).square(), last=norm()),
        "depends on the inputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_centre_residual_refuses(name: str) -> None:
    args, make, reason = REFUSED[name]
    assert_refused(make().double(), args, PASSES, reason)


def test_weights_in_training_are_refused() -> None:
    _, args, make = FIRES["embedding"]
    assert_refused(make().double(), args, PASSES, "may still be trained", frozen=False)


def test_half_precision_is_refused() -> None:
    _, args, make = FIRES["embedding"]
    assert_refused(make().half(), args, PASSES, "float16")


@torch.no_grad()
def test_reading_the_mean_would_have_been_wrong() -> None:
    """What the refusal of other readers is for."""
    net = REFUSED["read without a norm"][1]().double()
    y = net.table(*IDS)
    centred = y - y.mean(-1, keepdim=True)
    assert (net.last(centred) * net.a(centred) - net(*IDS)).abs().max() > 1e6 * EXACT


@pytest.mark.parametrize(
    ("name", "options", "norms"),
    [
        ("GPT2LMHeadModel", {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4,
                             "bos_token_id": 1, "eos_token_id": 2}, 5),
        ("ViTForImageClassification", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                       "intermediate_size": 48, "image_size": 16, "patch_size": 4}, 5),
        ("BertModel", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "intermediate_size": 48}, 1),
    ],
)  # fmt: skip
@torch.no_grad()
def test_streams_of_models(name: str, options: dict[str, Any], norms: int) -> None:
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**options)).eval().double()
    image = "image_size" in options
    x = draw(2, 3, 16, 16) if image else torch.arange(24).view(2, 12) % 61
    net = Net(lambda n, x: n.model(x, use_cache=False)[0] if not image else n.model(x)[0], model=model).double()
    passes = [*fxopt.passes.exact_pipeline(), CentreResidual()]
    report = fxopt.explain_program(fxopt.capture(net, (x,)), passes)
    assert [site.rule for site in report.sites].count("centred") == norms
    rewritten: Any = fxopt.rewrite(net, (x,), passes=passes, strict=True)
    expected = net(x)
    assert (rewritten(x) - expected).abs().max() <= EXACT * expected.abs().max().clamp(min=1)


def test_the_pass_runs_when_named() -> None:
    assert CentreResidual() not in fxopt.passes.exact_pipeline()
    assert fold(FIRES["embedding"][2](), IDS, PASSES).replacements
