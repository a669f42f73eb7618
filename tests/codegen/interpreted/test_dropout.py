"""Dropout in generated kernels, in the interpreter: against float64 with the same weights dropped, by statistics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward import kernel as backward
from fxopt.codegen.attention.philox import kept_weights, lowest_kept, philox
from fxopt.codegen.attention.portable.kernel import KIND, read_config, source
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from fxopt.testing import assert_within_budget
from tests.codegen.cases import SHAPES, WITHOUT_BANDS, Shape, captured, operands, specification
from tests.codegen.gradients import FLOWS, assert_gradients_within_budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
CONFIG, BACKWARD = "32x32w4s2", "16x32w4s2-32x32w4s2"
SEED = torch.tensor([0x1234_5678_9ABC_DEF1])
#: What Triton's own generators give for the offsets from ``start``.
DRAW = """
import triton
import triton.language as tl


@triton.jit
def draw(seed_ptr, words_ptr, rand_ptr, start, COUNT: tl.constexpr):
    n = tl.arange(0, COUNT)
    seed = tl.load(seed_ptr)
    offset = n.to(tl.int64) + start
    w0, w1, w2, w3 = tl.randint4x(seed, offset)
    tl.store(words_ptr + n, w0.to(tl.int64))
    tl.store(words_ptr + COUNT + n, w1.to(tl.int64))
    tl.store(words_ptr + 2 * COUNT + n, w2.to(tl.int64))
    tl.store(words_ptr + 3 * COUNT + n, w3.to(tl.int64))
    tl.store(rand_ptr + n, tl.rand(seed, offset))
"""


def dropping(spec: AttentionSpec, probability: float = 0.3) -> AttentionSpec:
    return dataclasses.replace(spec, dropout=probability)


def forward(
    spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor], config: str = CONFIG, seed: Tensor = SEED
) -> tuple[Tensor, Tensor]:
    q, k, v = inputs
    text = source(spec, q.shape[3], v.shape[3], q.dtype, read_config(config))
    out, lse = import_source(KIND, text).launch(q, k, v, captures, with_lse=True, seed=seed)
    return out, lse


def without_dropout(spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v = inputs
    text = source(dropping(spec, 0.0), q.shape[3], v.shape[3], q.dtype, read_config(CONFIG))
    out, lse = import_source(KIND, text).launch(q, k, v, captures, with_lse=True)
    return out, lse


def exact(spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor], seed: Tensor = SEED) -> Tensor:
    q, k, v = (x.double() for x in inputs)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    return reference.attention(q, k, v, wide, str(dataclasses.replace(spec, out_dtype=torch.float64)), seed)


def gradients(
    spec: AttentionSpec,
    inputs: Sequence[Tensor],
    captures: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None = None,
    config: str = BACKWARD,
) -> list[Tensor]:
    q, k, v = inputs
    out, lse = forward(spec, inputs, captures)
    wanted = [c.is_floating_point() for c in captures]
    blocks = backward.read_backward(config)
    text = backward.source(spec, q.shape[3], v.shape[3], q.dtype, blocks, wanted)
    launch = import_source(backward.KIND, text).launch
    found: list[Tensor] = launch(q, k, v, captures, out, lse, dout, dlse, seed=SEED)
    return found


@pytest.mark.parametrize("start", [0, 2**31 - 7, 2**32 - 7, 5 * 2**40 + 3])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 2, 0x1234_5678_9ABC_DEF1])
def test_reference_is_tritons_philox_bit_by_bit(seed: int, start: int) -> None:
    count = 64
    words, uniform = torch.zeros(4, count, dtype=torch.int64), torch.zeros(count)
    import_source(KIND, DRAW).draw[(1,)](torch.tensor([seed]), words, uniform, start, count)
    offset = torch.arange(count) + start
    zero = torch.zeros(1, dtype=torch.int64)
    found = torch.stack(
        [x.expand(count) for x in philox(torch.tensor([seed]), offset & 0xFFFFFFFF, offset >> 32, zero, zero)]
    )
    assert torch.equal(found, words & 0xFFFFFFFF)
    signed = torch.where(found[0] >= 2**31, found[0] - 2**32, found[0])
    expected = torch.where(signed < 0, -signed - 1, signed).float() * torch.tensor(4.6566127342e-10)
    torch.testing.assert_close(uniform, expected, atol=0, rtol=2**-23)


def test_philox_gives_the_published_numbers() -> None:
    """The known answers that come with the generator (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]  # fmt: skip
    for counter, (low, high), expected in cases:
        seed = torch.tensor([low]) | (torch.tensor([high]) << 32)
        found = philox(seed, *(torch.tensor([c]) for c in counter))
        assert tuple(int(x) for x in found) == expected


#: Every expression, with shapes and dtypes in turn.
NAMES = (*WITHOUT_BANDS, "causal-band", "band")
TURNS = [(name, list(SHAPES)[n % len(SHAPES)], list(DTYPES)[n % len(DTYPES)]) for n, name in enumerate(NAMES)]


@pytest.mark.parametrize(("name", "shape", "dtype"), TURNS)
def test_forward_is_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    spec = dropping(specification(name, sizes, DTYPES[dtype], "zero"))
    inputs, captures = operands(sizes, DTYPES[dtype]), captured(name, sizes, spec)
    out, lse = forward(spec, inputs, captures)
    eager = reference.attention(*inputs, captures, str(spec), SEED)
    floor = math.sqrt(sizes.head_dim) if dtype == "f32" else 0.0
    assert_within_budget(out, eager, exact(spec, inputs, captures), floor=floor)
    assert torch.equal(lse, without_dropout(spec, inputs, captures)[1]), "it is that of all weights"


@pytest.mark.parametrize(("name", "shape", "dtype"), [
    ("plain", "tails", "f32"), ("plain", "one-row", "f16"), ("causal", "fewer-keys", "bf16"),
    ("window", "packed", "f32"), ("padding", "grouped", "f16"), ("lengths", "fewer-keys", "f32"),
    ("softcap", "packed", "bf16"), ("alibi", "tails", "f16"), ("swin", "grouped", "bf16"),
    ("additive-mask", "tails", "bf16"), ("causal-padding", "grouped", "f32"), ("documents", "packed", "f16"),
])  # fmt: skip
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    spec = dropping(specification(name, sizes, DTYPES[dtype], "zero"))
    inputs, captures = operands(sizes, DTYPES[dtype]), captured(name, sizes, spec)
    dout = torch.randn(*inputs[0].shape[:3], sizes.value_dim).to(DTYPES[dtype])
    found = gradients(spec, inputs, captures, dout)
    assert_gradients_within_budget(spec, inputs, captures, found, dout, seed=SEED)


@pytest.mark.parametrize(("name", "dtype"), [
    ("slopes", "f32"), ("rows", "bf16"), ("keys", "bf16"), ("table", "f32"), ("batch-table", "bf16"),
    ("band", "f32"), ("batch-band", "bf16"),
])  # fmt: skip
def test_gradients_of_captured_tensors(name: str, dtype: str) -> None:
    score, mask, dims = FLOWS[name]
    sizes = {"b": 3, "h": 2, "i": 35, "j": 37, "-": 1, "p": 2, "d": 71}
    shape = Shape(16, 24, 35, 37, 1, "group", "bshd", batch=3)
    spec = AttentionSpec(parse(score), None if mask is None else parse(mask), (Capture(dims, DTYPES[dtype]),),
                         empty_rows="zero", dropout=0.2, out_dtype=DTYPES[dtype], out_layout="bshd")  # fmt: skip
    inputs, captures = operands(shape, DTYPES[dtype]), [torch.randn([sizes[x] for x in dims]).to(DTYPES[dtype])]
    dout = torch.randn(3, 2, 35, 24).to(DTYPES[dtype])
    found = gradients(spec, inputs, captures, dout)
    assert_gradients_within_budget(spec, inputs, captures, found, dout, seed=SEED)


def test_gradient_of_the_log_sum_exp() -> None:
    sizes = SHAPES["tails"]
    spec = dropping(specification("softcap", sizes, torch.float32, "zero"))
    inputs, dout, dlse = operands(sizes, torch.float32), torch.randn(2, 2, 35, 16), torch.randn(2, 2, 35)
    found = gradients(spec, inputs, [], dout, dlse)
    assert_gradients_within_budget(spec, inputs, [], found, dout, dlse, seed=SEED)


def identity(spec: AttentionSpec, rows: int, keys: int, config: str, seed: Tensor = SEED) -> Tensor:
    """The weights that a kernel uses, equal ones, as ``[2, 2, rows, keys]``: values that are the identity show them."""
    q, k = torch.zeros(2, 2, rows, keys), torch.zeros(2, 2, keys, keys)
    v = torch.eye(keys).expand(2, 2, keys, keys)
    return forward(spec, (q, k, v), [], config, seed)[0]


@pytest.mark.parametrize("config", ["16x16w4s2", "64x16w4s2", "32x128w4s2"])
def test_the_same_weights_are_dropped_whatever_the_blocks(config: str) -> None:
    spec = AttentionSpec(parse("s"), dropout=0.4)
    kept = kept_weights(torch.empty(2, 2, 70, 37), SEED, lowest_kept(0.4))
    expected = kept / (37 * 0.6)
    torch.testing.assert_close(identity(spec, 70, 37, config), expected.float())


@pytest.mark.parametrize("config", ["16x32w4s2-32x16w4s2", "64x16w4s1-16x64w4s1", "32x64w4s1-64x32w4s1"])
def test_the_backward_drops_what_the_forward_dropped_whatever_the_blocks(config: str) -> None:
    """With an identity as the gradient of the result, dv is the transpose of the weights that the forward used."""
    spec = AttentionSpec(parse("s"), dropout=0.4)
    q, k, v = torch.zeros(2, 1, 40, 40), torch.zeros(2, 1, 50, 40), torch.randn(2, 1, 50, 40)
    dout = torch.eye(40).expand(2, 1, 40, 40)
    kept = kept_weights(torch.empty(2, 1, 40, 50), SEED, lowest_kept(0.4))
    found = gradients(spec, (q, k, v), [], dout, config=config)[2]
    torch.testing.assert_close(found, (kept / (50 * 0.6)).float().mT)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_rate_and_mean(probability: float) -> None:
    """Within five standard deviations of a binomial distribution: of the rate, and of each row's sum of weights."""
    spec, rows, keys = AttentionSpec(parse("s"), dropout=probability), 128, 128
    used = identity(spec, rows, keys, "64x64w4s2") * keys
    kept = (used > 0).double()
    deviation = math.sqrt(probability * (1 - probability) / kept.numel())
    assert abs(kept.mean().item() - (1 - probability)) < 5 * deviation
    by_key = kept.mean((0, 1, 2))
    assert (by_key - (1 - probability)).abs().max() < 5 * deviation * math.sqrt(keys)
    assert abs(used.double().mean().item() - 1) < 5 * deviation / (1 - probability)


def test_neighbours_and_heads_and_seeds_are_independent() -> None:
    kept = kept_weights(torch.empty(2, 2, 256, 256), SEED, lowest_kept(0.5)).double() * 2 - 1
    other = kept_weights(torch.empty(2, 2, 256, 256), SEED + 1, lowest_kept(0.5)).double() * 2 - 1
    pairs = [(kept[0], kept[1]), (kept[:, 0], kept[:, 1]), (kept, other), (kept[0, 0], kept[0, 0].T)]
    for shift in (1, 7, 8, 9, 16):
        pairs += [(kept[..., shift:, :], kept[..., :-shift, :]), (kept[..., shift:], kept[..., :-shift])]
    pairs.append((kept[..., 8:, 8:], kept[..., :-8, :-8]))
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())


def test_another_seed_drops_other_weights_and_the_same_one_the_same() -> None:
    spec = AttentionSpec(parse("s"), dropout=0.5)
    first, again, other = (identity(spec, 20, 20, CONFIG, torch.tensor([n])) for n in (3, 3, 3 + 2**32))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("name", "shape"), [("swin", "fewer-keys"), ("causal-padding", "packed")])
def test_a_generated_file_holds_a_reference_of_its_own(name: str, shape: str) -> None:
    sizes = SHAPES[shape]
    spec = dropping(specification(name, sizes, torch.float32, "nan"))
    (q, k, v), captures = operands(sizes, torch.float32), captured(name, sizes, spec)
    expected = exact(spec, (q, k, v), captures)
    widths = (sizes.head_dim, sizes.value_dim, torch.float32)
    forwards = import_source(KIND, source(spec, *widths, read_config(CONFIG)))
    torch.testing.assert_close(forwards.reference(q, k, v, captures, seed=SEED), expected, equal_nan=True)
    blocks, wanted = backward.read_backward(BACKWARD), [False] * len(captures)
    gradient = import_source(backward.KIND, backward.source(spec, *widths, blocks, wanted))
    torch.testing.assert_close(gradient.reference(q, k, v, captures, seed=SEED)[0], expected, equal_nan=True)


@pytest.mark.parametrize("name", ["padding", "causal-padding", "documents"])
def test_captured_vectors_limit_the_keys(name: str) -> None:
    """With so many keys a small kernel in front finds the ones that can count; the same weights are dropped."""
    sizes = Shape(16, 16, 20, 140)
    spec = dropping(specification(name, sizes, torch.float32, "zero"))
    inputs, captures = operands(sizes, torch.float32), captured(name, sizes, spec)
    captures[-1][..., :40] = 0
    captures[-1][..., 100:] = 0
    out, _ = forward(spec, inputs, captures)
    eager = reference.attention(*inputs, captures, str(spec), SEED)
    assert_within_budget(out, eager, exact(spec, inputs, captures), floor=4.0)


@pytest.mark.parametrize(("empty_rows", "expected"), [("nan", torch.nan), ("zero", 0.0)])
def test_rows_without_keys(empty_rows: str, expected: float) -> None:
    spec = dropping(specification("padding", Shape(16, 16, 20, 20), torch.float32, empty_rows))
    kept = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    kept[1] = False
    out, _ = forward(spec, operands(Shape(16, 16, 20, 20), torch.float32), [kept])
    torch.testing.assert_close(out[1], torch.full_like(out[1], expected), equal_nan=True)
    assert out[0].isfinite().all()


@pytest.mark.parametrize("keys", [0, 5])
@pytest.mark.parametrize("rows", [0, 5])
def test_sizes_of_zero(rows: int, keys: int) -> None:
    spec = AttentionSpec(parse("s"), dropout=0.5)
    inputs = q, k, v = [torch.randn(2, 2, n, 16) for n in (rows, keys, keys)]
    out, _ = forward(spec, inputs, [])
    torch.testing.assert_close(out, reference.attention(q, k, v, [], str(spec), SEED))
    assert [x.shape for x in gradients(spec, inputs, [], torch.randn(2, 2, rows, 16))] == [x.shape for x in inputs]
