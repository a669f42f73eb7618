"""The backward of attention without a GPU: its source, its row ranges, its operator, its refusals."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention.backward.config import RECOMPUTE, fitting, shared_bytes, split_config
from fxopt.codegen.attention.backward.kernel import candidates, objection, read_backward, source
from fxopt.codegen.attention.backward.operator import attention_backward, chosen_config
from fxopt.codegen.attention.backward.row_range import row_range_text, row_spans
from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.expression import evaluate
from fxopt.codegen.printing import emit
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import conjunction, conjuncts, parse
from fxopt.lowering.attention import _with_backward
from tests.codegen.cases import EXPRESSIONS, SHAPES, specification
from tests.codegen.gradients import FLOWS
from tests.codegen.test_operator import leaves

CONFIG = read_backward("64x128w8s2-128x64w8s2")
TL: Any = SimpleNamespace(
    minimum=min, maximum=max, cdiv=lambda a, b: -(-a // b), where=lambda c, a, b: a if c else b, int32=int
)


@pytest.mark.parametrize("name", [*EXPRESSIONS, *FLOWS])
def test_same_specification_same_bytes_and_valid_python(name: str) -> None:
    if name in EXPRESSIONS:
        spec = specification(name, SHAPES["packed"], torch.bfloat16)
    else:
        score, mask, dims = FLOWS[name]
        captures = (Capture(dims, torch.bfloat16),)
        kept = None if mask is None else parse(mask)
        spec = AttentionSpec(parse(score), kept, captures, out_dtype=torch.bfloat16)
    wanted = [c.kind == "float" for c in spec.captures]
    text = source(spec, 80, 80, torch.bfloat16, CONFIG, wanted)
    assert text == source(spec, 80, 80, torch.bfloat16, CONFIG, wanted)
    tree = ast.parse(text)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert {"prepare_kernel", "dq_kernel", "dkdv_kernel"} < set(functions)
    assert functions[-3:] == ["launch", "reference", "main"]
    assert str(spec.score) in (ast.get_docstring(tree) or "")
    assert "fxopt" not in text.split('"""', 2)[2] and "atomic" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_captures_that_need_no_gradient_cost_nothing() -> None:
    spec = specification("swin", SHAPES["packed"], torch.bfloat16)
    text = source(spec, 80, 80, torch.bfloat16, CONFIG, (False, False))
    assert "c0_grad" not in text and "c0_kernel" not in text


@pytest.mark.parametrize("mask", [
    "j <= i", "j <= i + 3", "j <= i - 5", "(j <= i) & (j > i - 7)", "j > i - 2", "j >= 4", "j < 11", "j < 0",
    "(j < 9) & (j >= 3) & (j <= i)", "((i - j) < 5) & ((j - i) <= 3)", "j < c0", "(j <= i) & (j > c0)",
    "j <= i + (Sk - Sq)", "(j <= i + 2) & ((i + j) % 2 == 0)",
])  # fmt: skip
@pytest.mark.parametrize(("rows", "keys"), [(33, 33), (17, 40), (40, 17), (32, 16)])
def test_rows_that_a_block_of_keys_needs(mask: str, rows: int, keys: int) -> None:
    """Every kept score is visited once, and in full blocks every conjunct that bounds the keys holds."""
    spec = AttentionSpec(parse("s"), parse(mask), (Capture("b---", torch.int64),))
    found = key_range(spec)
    bounds = conjunction(tuple(t for t in conjuncts(spec.mask) if t not in found.rest))
    block_m, block_n, length = 8, 4, 13
    text = row_range_text(found, lambda e, names: emit(e, names, spec.capture_kinds)).replace(".to(tl.int32)", "")
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    kept, bounded = (
        torch.as_tensor(
            evaluate(e, {"s": torch.zeros(rows, keys), "i": i, "j": j, "Sq": rows, "Sk": keys}, [torch.tensor(length)])
            if e is not None else True
        ).expand(rows, keys)
        for e in (spec.mask, bounds)
    )  # fmt: skip
    for first in range(0, keys, block_n):
        last = min(first + block_n, keys) - 1
        scope: dict[str, Any] = {"tl": TL, "Sq": rows, "Sk": keys, "first": first, "last": last, "c0": length}
        scope |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
        exec(text, scope)
        visited = torch.zeros(rows, dtype=torch.int)
        for span in row_spans(found):
            starts = range(eval(span.first, scope), eval(span.last, scope), block_m)
            assert span.loops or len(starts) <= 1
            assert not (span.beyond and rows % block_m == 0 and starts)
            for start in starts:
                visited[start : start + block_m] += 1
                if not span.bounded:
                    assert start + block_m <= rows
                    assert bounded[start : start + block_m, first : last + 1].all()
        needed = kept[:, first : last + 1].any(1)
        assert (visited <= 1).all() and (visited[needed] == 1).all()


def test_configurations() -> None:
    assert str(read_backward("64x128w8s2-128x64w8s2")) == "64x128w8s2-128x64w8s2"
    assert split_config("128x64w8s3/64x128w8s2-128x64w8s2") == ("128x64w8s3", "64x128w8s2-128x64w8s2")
    assert split_config("128x64w8s3") == ("128x64w8s3", "")
    for wrong in ("64x128w8s2", "64x128w8s2-", "64x128w8s2tma-128x64w8s2", "a-b"):
        with pytest.raises(LoweringError, match="configuration"):
            read_backward(wrong)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 40, 64, 80, 128, 192, 256])
def test_one_or_two_configurations_fit(
    width: int, dtype: torch.dtype, capability: tuple[int, int], heavy: bool
) -> None:
    found = fitting(width, width, dtype, capability, heavy)
    assert 1 <= len(found) <= 2
    limit = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448}.get(capability, 101_376)
    assert all(shared_bytes(c, width, width, dtype) <= limit for c in found)


@pytest.mark.parametrize(("change", "reason"), [
    ({"dropout": 1.0}, "leaves nothing"),
    ({"dropout": 0.1, "empty_rows": "uniform"}, "share equally"),
    ({"out_dtype": torch.bfloat16}, "too coarse"),
    ({"out_dtype": torch.float64}, "float64"),
])  # fmt: skip
def test_objections(change: dict[str, Any], reason: str) -> None:
    spec = AttentionSpec(parse("s"), **change)
    assert reason in (objection(spec, 64, 64, torch.float32) or "")
    assert candidates(Problem(spec, 64, 64, torch.float32, (9, 0))) == ()
    with pytest.raises(LoweringError, match=reason):
        source(spec, 64, 64, torch.float32, CONFIG, ())


def test_means_are_for_kernels_that_say_so() -> None:
    for mask, reason in (("j <= i", True), (None, False)):
        spec = AttentionSpec(parse("s"), None if mask is None else parse(mask), empty_rows="uniform")
        assert ("mean" in (objection(spec, 64, 64, torch.float32) or "")) == reason
        assert objection(spec, 64, 64, torch.float32, averages=True) is None
        assert candidates(Problem(spec, 64, 64, torch.float32, (9, 0)))
        assert chosen_config(spec, torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4), "A") == "A"


def test_without_a_log_sum_exp_the_weights_are_recomputed() -> None:
    spec, q = AttentionSpec(parse("s")), torch.zeros(1, 1, 4, 16)
    assert chosen_config(spec, q, q, torch.empty(0), "64x128w8s2-128x64w8s2") == RECOMPUTE
    assert chosen_config(spec, q, q, torch.zeros(1, 1, 4), "64x128w8s2-128x64w8s2") != RECOMPUTE


@pytest.mark.parametrize(
    ("name", "shape"), [("swin", "fewer-keys"), ("causal-padding", "packed"), ("plain", "one-row")]
)
def test_opcheck(name: str, shape: str) -> None:
    spec, inputs, captures = leaves(name, shape)
    inputs, captures = [x.detach() for x in inputs], [c.detach() for c in captures]
    out, lse = attention_forward(*inputs, captures, str(spec), "", True)
    wanted = [c.is_floating_point() for c in captures]
    arguments = (*inputs, captures, out, lse, torch.randn_like(out), None, wanted, str(spec), "")
    for operator in (attention_backward, torch.ops.fxopt.attention_backward_launch.default):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_gradients_of_gradients() -> None:
    spec, inputs, _ = leaves("softcap", "tails")

    def penalty(q: Tensor) -> Tensor:
        out, _ = attention_forward(q, inputs[1], inputs[2], [], str(spec), "", True)
        (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return gradient.square().sum()

    torch.autograd.gradcheck(penalty, inputs[0][:1, :1, :3].detach().requires_grad_(), atol=1e-4)


def test_training_tries_two_configurations_of_the_backward() -> None:
    problem = Problem(AttentionSpec(parse("s"), out_dtype=torch.bfloat16), 64, 64, torch.bfloat16, (8, 0))
    first, second = map(str, candidates(problem))
    refused: dict[str, str] = {}
    assert _with_backward(problem, ("A", "B"), refused) == (f"A/{first}", f"B/{first}", f"A/{second}")
    assert "8.0" in refused["triton-hopper-backward"]
    coarse = Problem(AttentionSpec(parse("s"), out_dtype=torch.bfloat16), 64, 64, torch.float32, (9, 0))
    assert _with_backward(coarse, ("A",), refused) == (f"A/{RECOMPUTE}",)
    assert "too coarse" in refused["triton-backward"]
