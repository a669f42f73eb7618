"""Dropout by a seed: what the operator computes on the CPU, its gradients, and the text of its kernels."""

from __future__ import annotations

import ast
import dataclasses

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import kernels, reference
from fxopt.codegen.attention.backward import kernel as backward
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.philox import factors, lowest_kept
from fxopt.codegen.attention.portable.kernel import candidates, read_config, source
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import ExpressionError, LoweringError
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, SHAPES, WITHOUT_BANDS, specification
from tests.codegen.test_operator import leaves

CONFIG, BACKWARD = "64x32w4s2", "64x128w8s2-128x64w8s2"
SEED = torch.tensor([77])


def dropping(name: str, shape: str) -> tuple[AttentionSpec, list[Tensor], list[Tensor]]:
    spec, inputs, captures = leaves(name, shape)
    return dataclasses.replace(spec, dropout=0.3), inputs, captures


@pytest.mark.parametrize("name", ["plain", "swin"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck(name: str, with_lse: bool) -> None:
    spec, inputs, captures = dropping(name, "fewer-keys")
    results = torch.library.opcheck(attention_forward, (*inputs, captures, str(spec), CONFIG, with_lse, SEED))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("shape", ["tails", "fewer-keys", "grouped"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gradients_agree_with_the_reference_under_autograd(name: str, shape: str) -> None:
    spec, inputs, captures = dropping(name, shape)
    q, k, v = inputs
    wanted = [*inputs, *(c for c in captures if c.requires_grad)]
    out, _ = attention_forward(*inputs, captures, str(spec), CONFIG, False, SEED)
    expected = reference.attention(q, k, v, captures, str(spec), SEED)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out, wanted, cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, cotangent))


def test_gradients_of_gradients_drop_the_same_weights() -> None:
    spec = AttentionSpec(parse("s * 0.5"), parse("j <= i"), dropout=0.4, out_dtype=torch.float64)
    inputs = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: attention_forward(q, k, v, [], str(spec), CONFIG, False, SEED)[0], inputs
    )


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_dropout_is_a_probability(probability: float) -> None:
    with pytest.raises(ExpressionError, match="probability"):
        AttentionSpec(parse("s"), dropout=probability)
    with pytest.raises(ExpressionError, match="probability"):
        read_spec(str(AttentionSpec(parse("s"))).replace("dropout=0.0", f"dropout={probability}"))


def test_certain_dropout_is_left_to_the_reference() -> None:
    spec = AttentionSpec(parse("s"), dropout=1.0)
    q = torch.randn(1, 1, 4, 16)
    assert (reference.attention(q, q, q, [], str(spec)) == 0).all()
    with pytest.raises(LoweringError, match="leaves nothing"):
        kernels.source(spec, 16, 16, torch.float32, CONFIG)


@pytest.mark.parametrize(("probability", "word"), [(0.5, 2**31), (1e-12, 0), (1 - 1e-12, 2**32 - 1), (0.25, 2**30)])
def test_the_lowest_word_that_is_kept(probability: float, word: int) -> None:
    assert lowest_kept(probability) == word


def test_kept_weights_are_scaled_in_their_own_dtype() -> None:
    found = factors(torch.empty(1, 1, 64, 64, dtype=torch.bfloat16), SEED, 0.2)
    assert found.dtype is torch.bfloat16 and found.unique().tolist() == [0.0, 1.25]


def test_only_the_portable_kernel_drops_weights_and_the_others_say_so() -> None:
    spec = AttentionSpec(parse("s * 0.125"), dropout=0.1, out_dtype=torch.bfloat16)
    few = Problem(spec, 64, 64, torch.bfloat16, (9, 0), 8, 8, 8, 64, 64)
    found, refused = kernels.candidates(few)
    assert found and all(":" not in config for config in found)
    assert {"hopper", "pairs", "short", "split"} == set(refused) and refused["short"] == "it drops no weights"
    without = dataclasses.replace(few, spec=dataclasses.replace(spec, dropout=0.0))
    taken = kernels.FAMILIES["short"].candidates(without)[0]
    with pytest.raises(LoweringError, match="drops no weights"):
        kernels.source(spec, 64, 64, torch.bfloat16, taken)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 40, 64, 80, 128, 256])
def test_candidates(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    spec = AttentionSpec(parse("s"), dropout=0.1, out_dtype=dtype)
    assert 1 <= len(candidates(Problem(spec, width, width, dtype, capability))) <= 4
    assert 1 <= len(backward.candidates(Problem(spec, width, width, dtype, capability))) <= 2


@pytest.mark.parametrize("name", WITHOUT_BANDS)
def test_text_without_dropout_knows_of_none(name: str) -> None:
    spec = specification(name, SHAPES["packed"], torch.bfloat16, "zero")
    config = backward.read_backward(BACKWARD)
    wanted = [c.kind == "float" for c in spec.captures]
    texts = (
        source(spec, 80, 80, torch.bfloat16, read_config(CONFIG)),
        backward.source(spec, 80, 80, torch.bfloat16, config, wanted),
    )
    for text in texts:
        assert not any(word in text for word in ("seed", "philox", "stay"))


@pytest.mark.parametrize("name", WITHOUT_BANDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_text_with_dropout_is_complete(name: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(specification(name, SHAPES["packed"], dtype, "zero"), dropout=0.1)
    wanted = [c.kind == "float" for c in spec.captures]
    forward = source(spec, 80, 80, dtype, read_config(CONFIG))
    gradients = backward.source(spec, 80, 80, dtype, backward.read_backward(BACKWARD), wanted)
    for text in (forward, gradients):
        functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        assert {"stays", "launch", "kept_weights", "reference", "main"} <= set(functions)
        assert max(map(len, text.splitlines())) <= 120
        assert "fxopt" not in text.split('"""', 2)[2]
    assert forward == source(spec, 80, 80, dtype, read_config(CONFIG))
