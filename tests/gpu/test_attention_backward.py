"""Generated backward kernels on the GPU: every expression, dtype and configuration tried, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention.backward.kernel import candidates, listed
from fxopt.codegen.attention.backward.operator import attention_backward, module
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.portable.kernel import candidates as forward_candidates
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, Shape, in_turn, pairwise, specification
from tests.codegen.gradients import FLOWS, assert_gradients_within_budget
from tests.codegen.holes import HOLES
from tests.codegen.vectors import VECTORS
from tests.gpu.problems import of_any_size
from tests.gpu.test_attention_kernels import ALL_SHAPES, DTYPES, LARGE, on_gpu

pytestmark = pytest.mark.gpu
NAMES = sorted(EXPRESSIONS, key=lambda name: "band" in name)


def backward(
    spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor], dout: Tensor, config: str
) -> list[Tensor]:
    """The gradients through the operators, the backward by one configuration."""
    q, k, v = inputs
    forward = str(forward_candidates(of_any_size(spec, q.shape[3], v.shape[3], q.dtype))[0])
    out, lse = attention_forward(q, k, v, list(captures), str(spec), forward, True)
    wanted = [c.is_floating_point() for c in captures]
    found: list[Tensor] = attention_backward(q, k, v, list(captures), out, lse, dout, None, wanted, str(spec), config)
    return found


def configurations(spec: AttentionSpec, shape: Shape, dtype: torch.dtype) -> list[str]:
    found = candidates(of_any_size(spec, shape.head_dim, shape.value_dim, dtype))
    assert found, "no configuration fits this device"
    return [str(config) for config in found]


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(NAMES, ALL_SHAPES, DTYPES))
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = ALL_SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype], "zero")
    inputs, captures = on_gpu(name, sizes, spec, DTYPES[dtype])
    dout = torch.randn(*inputs[0].shape[:3], sizes.value_dim, device="cuda").to(DTYPES[dtype])
    config = in_turn(configurations(spec, sizes, DTYPES[dtype]), name, shape, ALL_SHAPES)
    found = backward(spec, inputs, captures, dout, config)
    assert_gradients_within_budget(spec, inputs, captures, found, dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_captured_tensors(name: str, dtype: str) -> None:
    score, mask, dims = FLOWS[name]
    sizes = {"b": 5, "h": 4, "i": 200, "j": 200, "-": 1, "p": 2, "d": 399}
    shape = Shape(64, 64, 200, 200, 2, "group", "bshd", batch=5, heads=4)
    spec = AttentionSpec(parse(score), None if mask is None else parse(mask), (Capture(dims, DTYPES[dtype]),),
                         empty_rows="zero", out_dtype=DTYPES[dtype], out_layout="bshd")  # fmt: skip
    inputs, _ = on_gpu("plain", shape, specification("plain", shape, DTYPES[dtype]), DTYPES[dtype])
    capture = torch.randn([sizes[x] for x in dims], device="cuda").to(DTYPES[dtype])
    dout = torch.randn_like(inputs[0])
    for config in configurations(spec, shape, DTYPES[dtype]):
        found = backward(spec, inputs, [capture], dout, config)
        assert_gradients_within_budget(spec, inputs, [capture], found, dout)


@pytest.mark.parametrize("name", ["plain", "causal", "swin", "alibi", "band"])
def test_the_same_inputs_give_the_same_bits(name: str) -> None:
    shape = LARGE["D64"]
    spec = specification(name, shape, torch.bfloat16)
    inputs, captures = on_gpu(name, shape, spec, torch.bfloat16)
    dout = torch.randn(2, 4, 200, 64, device="cuda").to(torch.bfloat16)
    first, *others = (backward(spec, inputs, captures, dout, "") for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fill", [-1e4, -1e30, -3.3895313892515355e38])
def test_rows_of_finite_fills_share_their_weight_equally(fill: float) -> None:
    shape = Shape(64, 64, 200, 300, heads=4)
    spec = specification("additive-mask", shape, torch.bfloat16)
    (q, k, v), _ = on_gpu("plain", shape, specification("plain", shape, torch.bfloat16), torch.bfloat16)
    q = q * 0 if fill == -1e4 else q  # such a fill does not absorb the scores
    mask = torch.zeros(2, 1, 1, 300, device="cuda", dtype=torch.bfloat16)
    mask[0], mask[1, ..., :200] = fill, fill
    dout = torch.randn_like(q)
    found = backward(spec, (q, k, v), [mask], dout, "")
    assert_gradients_within_budget(spec, (q, k, v), [mask], found, dout)


@pytest.mark.parametrize("name", VECTORS)
def test_rows_that_give_the_mean(name: str) -> None:
    torch.manual_seed(0)
    shape = Shape(64, 64, 200, 300, 2, "group", "bshd", batch=4, heads=4)
    spec = VECTORS[name].specification(torch.bfloat16, "uniform")
    (q, k, v), _ = on_gpu("plain", shape, specification("plain", shape, torch.bfloat16), torch.bfloat16)
    captures = [x.cuda() for x in VECTORS[name].draw(shape)]
    dout = torch.randn_like(q)
    for config in configurations(spec, shape, torch.bfloat16):
        found = backward(spec, (q, k, v), captures, dout, config)
        assert_gradients_within_budget(spec, (q, k, v), captures, found, dout)


@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("name", HOLES)
def test_lists_leave_out_blocks(name: str, empty_rows: EmptyRows) -> None:
    torch.manual_seed(0)
    shape = Shape(64, 64, 400, 600, 2, "group", "bshd", batch=2, heads=4)
    spec = HOLES[name].specification(torch.bfloat16, empty_rows)
    (q, k, v), _ = on_gpu("plain", shape, specification("plain", shape, torch.bfloat16), torch.bfloat16)
    captures = [x.cuda() for x in HOLES[name].draw(shape)]
    dout = torch.randn_like(q)
    for config in candidates(of_any_size(spec, 64, 64, torch.bfloat16)):
        first, *others = (backward(spec, (q, k, v), captures, dout, str(listed(config))) for _ in range(3))
        assert_gradients_within_budget(spec, (q, k, v), captures, first, dout)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("lengths", [(1000, 1000), (17, 900), (900, 65)])
@pytest.mark.parametrize("dims", ["-h-d", "bh-d", "---d"])
def test_long_bands(dims: str, lengths: tuple[int, int]) -> None:
    """Many diagonals, few ones, and parts of batch and heads that programs of their own add up."""
    torch.manual_seed(0)
    rows, keys = lengths
    shape = Shape(64, 64, rows, keys, 2, "group", "bshd", batch=3, heads=4)
    spec = AttentionSpec(parse("s * 0.125 + c0"), None, (Capture(dims, torch.bfloat16),), out_dtype=torch.bfloat16,
                         out_layout="bshd")  # fmt: skip
    inputs, _ = on_gpu("plain", shape, specification("plain", shape, torch.bfloat16), torch.bfloat16)
    sizes = {"b": 3, "h": 4, "-": 1, "d": rows + keys - 1}
    band = torch.randn([sizes[x] for x in dims], device="cuda").to(torch.bfloat16)
    dout = torch.randn_like(inputs[0])
    for config in configurations(spec, shape, torch.bfloat16):
        found = backward(spec, inputs, [band], dout, config)
        assert_gradients_within_budget(spec, inputs, [band], found, dout)


def test_no_square_matrix_is_allocated_for_a_band() -> None:
    spec = AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("-h-d", torch.bfloat16),), out_dtype=torch.bfloat16)
    q = torch.randn(1, 8, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    band = torch.randn(1, 8, 1, 2 * 8192 - 1, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    config = str(forward_candidates(of_any_size(spec, 64, 64, torch.bfloat16))[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = attention_forward(q, q, q, [band], str(spec), config, True)
    torch.autograd.grad(out, (q, band), torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 16 * q.numel() * q.element_size()


def test_no_square_matrix_is_allocated() -> None:
    spec = AttentionSpec(parse("s * 0.125"), parse("j <= i"), out_dtype=torch.bfloat16)
    q = torch.randn(1, 8, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    config = str(forward_candidates(of_any_size(spec, 64, 64, torch.bfloat16))[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = attention_forward(q, q, q, [], str(spec), config, True)
    torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 16 * q.numel() * q.element_size()


def test_one_kernel_serves_every_length() -> None:
    spec = specification("causal", LARGE["D64"], torch.bfloat16)
    config = configurations(spec, LARGE["D64"], torch.bfloat16)[0]
    launched = module(str(spec), 64, 64, torch.bfloat16, config, ())
    for length in (17, 64, 65, 1000, 1024):
        q = torch.randn(1, 2, length, 64, device="cuda", dtype=torch.bfloat16)
        backward(spec, (q, q, q), [], torch.randn_like(q), config)
    for kernel in (launched.prepare_kernel, launched.dkdv_kernel, launched.dq_kernel):
        compiled = kernel.device_caches[torch.cuda.current_device()][0]
        assert len(compiled) <= 4, "lengths must not specialise the kernel (strides may, on divisibility by 16)"
