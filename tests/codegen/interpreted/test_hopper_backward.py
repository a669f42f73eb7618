"""The Hopper backward against float64: its Gluon kernel emulated, its Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward.hopper import needed
from fxopt.codegen.attention.backward.hopper.kernel import objection, source
from fxopt.codegen.attention.backward.kernel import KIND
from fxopt.codegen.attention.packed import Heads, Places, unpacked
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, Shape, captured, operands, specification, twice
from tests.codegen.emulated_gluon import Descriptor, emulated
from tests.codegen.fillings import lengths, padded, vectors
from tests.codegen.gradients import assert_input_gradients_within_budget
from tests.codegen.interpreted.test_hopper_hulls import Launched
from tests.codegen.vectors import VECTORS

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {
    "even": Shape(64, 64, 128, 128, 2, "group", "bhsd", heads=2),
    "tails": Shape(64, 64, 131, 131, 1, "group", "bshd", heads=2),
    "fewer-keys": Shape(64, 64, 200, 77, 2, "tile", "bshd", batch=1, heads=4),
    "more-keys": Shape(72, 128, 70, 290, 1, "group", "bhsd", batch=1, heads=2),
    "packed": Shape(128, 128, 150, 150, 2, "group", "bshd", packed=True),
}
NAMES = [
    name
    for name in EXPRESSIONS
    if objection(specification(name, SHAPES["even"], torch.bfloat16), 64, 64, torch.bfloat16, (9, 0)) is None
]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of rows are found for fewer of them than would be worth it."""
    monkeypatch.setattr(needed, "_FEWEST", 256)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def forward(spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v = inputs
    out = reference.attention(q, k, v, list(captures), str(spec))
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    lse = torch.logsumexp(reference.logits(spec, q.double(), k.double(), wide), -1)
    return out, lse.float()


def check(
    spec: AttentionSpec, inputs: Sequence[Tensor], captures: Sequence[Tensor], config: str, folder: Path,
    dlse: Tensor | None = None,
) -> None:  # fmt: skip
    q, k, v = inputs
    out, lse = forward(spec, inputs, captures)
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(spec.out_dtype)
    text = source(spec, q.shape[3], v.shape[3], q.dtype, config, [False] * len(captures))
    module = emulated(text, folder)
    found = module.launch(q, k, v, captures, out, lse, dout, dlse)
    assert_input_gradients_within_budget(spec, inputs, captures, found, dout, dlse)


@pytest.mark.parametrize(("name", "shape", "dtype"), twice(NAMES, SHAPES, DTYPES))
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, dtype: str, tmp_path: Path) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype], "zero" if len(shape) % 2 else "nan")
    config = "hopper:64x128s2" if sizes.head_dim > 64 else "hopper:64x128s4"
    for order in ("", "a")[: 1 + (sizes.head_dim <= 64)]:
        check(spec, operands(sizes, DTYPES[dtype]), captured(name, sizes, spec), config + order, tmp_path)


@pytest.mark.parametrize("name", ["plain", "causal", "lengths", "softcap"])
def test_blocks_of_128_rows(name: str, tmp_path: Path) -> None:
    sizes = Shape(64, 64, 300, 190, 1, "group", "bshd", batch=1, heads=2)
    spec = specification(name, sizes, torch.bfloat16, "zero")
    check(spec, operands(sizes, torch.bfloat16), captured(name, sizes, spec), "hopper:128x128s2", tmp_path)


@pytest.mark.parametrize("name", ["causal", "window", "lengths", "documents"])
@pytest.mark.parametrize(("rows", "keys"), [(33, 290), (290, 33), (1, 129), (129, 1)])
def test_ranges_without_rows_and_shared_heads_end(name: str, rows: int, keys: int, tmp_path: Path) -> None:
    """Keys that no row asks for: barriers must not wait for what no one sends."""
    sizes = Shape(64, 64, rows, keys, 2, "group", "bhsd", batch=1, heads=4)
    spec = specification(name, sizes, torch.bfloat16, "zero")
    inputs, captures = operands(sizes, torch.bfloat16), captured(name, sizes, spec)
    for config in ("hopper:64x128s2", "hopper:64x128s4a", "hopper:128x128s2"):
        check(spec, inputs, captures, config, tmp_path)


def test_the_emulation_refuses_what_tma_refuses() -> None:
    x = torch.zeros(64)
    vector = Descriptor(x, [64], [1], [16], None)
    assert vector.block([4]).shape == (16,)
    for place in (1, 2, 3, 6):
        with pytest.raises(AssertionError, match="multiples of 16 bytes"):
            vector.block([place])
    with pytest.raises(AssertionError):
        Descriptor(x[1:], [32], [1], [16], None)
    with pytest.raises(AssertionError):
        Descriptor.from_tensor(torch.zeros(2, 9), [1, 8], None)


@pytest.mark.parametrize("name", ["causal", "alibi"])
def test_gradients_of_the_log_sum_exp(name: str, tmp_path: Path) -> None:
    sizes = SHAPES["tails"]
    spec = specification(name, sizes, torch.bfloat16, "zero")
    inputs = operands(sizes, torch.bfloat16)
    check(spec, inputs, captured(name, sizes, spec), "hopper:64x128s2", tmp_path, torch.randn(inputs[0].shape[:3]))


@pytest.mark.parametrize("mask", [None, "(j <= i) & (j > i - 40)", "(j >= i - 3) & (j < 90)"])
def test_distances_in_the_score(mask: str | None, tmp_path: Path) -> None:
    """They are one number of a thread and constants, as bounds of the mask are."""
    sizes = SHAPES["tails"]
    score, captures = parse("s * 0.125 + c0 * log(1.0 + abs(float(j - i)))"), (Capture("-h--", torch.float32),)
    spec = AttentionSpec(score, None if mask is None else parse(mask), captures, out_dtype=torch.bfloat16)
    inputs, slopes = operands(sizes, torch.bfloat16), -torch.rand(1, sizes.heads, 1, 1)
    check(spec, inputs, [slopes], "hopper:64x128s4", tmp_path)


def test_finite_fills_share_the_weight_equally(tmp_path: Path) -> None:
    sizes = Shape(64, 64, 70, 140, batch=2)
    spec = specification("additive-mask", sizes, torch.bfloat16)
    mask = torch.zeros(2, 1, 1, 140, dtype=torch.bfloat16)
    mask[0], mask[1, ..., :90] = -1e30, -1e30
    check(spec, operands(sizes, torch.bfloat16), [mask], "hopper:64x128s2", tmp_path)


def test_nearly_every_expression_without_tiles_is_served() -> None:
    assert set(EXPRESSIONS) - set(NAMES) == {"tile-bias", "swin", "band", "causal-band", "finite-fill"}


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["mixed", "empty", "one", "equal"])
def test_padded_rows_and_keys_are_left_out(name: str, rows: bool, tmp_path: Path) -> None:
    """By limits of whole blocks; and gradients stay within the budget of eager."""
    filled = lengths(name, 330)[:3]
    spec = padded(rows, "zero")
    sizes = Shape(64, 64, 330, 330, 1, batch=len(filled), heads=2)
    inputs, captures = operands(sizes, torch.bfloat16), vectors(filled, 330, rows)
    for config in ("hopper:64x128s4", "hopper:64x128s4a"):
        check(spec, inputs, captures, config, tmp_path)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", VECTORS)
def test_masks_of_vectors_limit_the_rows_of_keys(name: str, tmp_path: Path) -> None:
    sizes = Shape(64, 64, 290, 300, 1, batch=4, heads=1)
    spec = VECTORS[name].specification(torch.bfloat16, "zero")
    check(spec, operands(sizes, torch.bfloat16), VECTORS[name].draw(sizes), "hopper:64x128s4", tmp_path)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", [name for name in VECTORS if name != "prefix"])
def test_limits_hold_all_rows_that_keep_a_key_and_padding_exactly_these(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Shape(64, 64, 290, 300, 1, batch=4, heads=1)
    spec = VECTORS[name].specification(torch.bfloat16, "zero")
    q, k, v = operands(sizes, torch.bfloat16)
    captures = VECTORS[name].draw(sizes)
    module = import_source(KIND, source(spec, 64, 64, q.dtype, "hopper:64x128s4", [False] * len(captures)))
    launched = Launched(module.gradient_kernel.arg_names, lambda **_: None)
    monkeypatch.setattr(module, "gradient_kernel", launched)
    for other in ("prepare_kernel", "finish_kernel"):
        monkeypatch.setattr(module, other, Launched([], lambda **_: None))
    for function in ("described", "vectors"):
        monkeypatch.setattr(module, function, lambda x, *_: x)
    module.launch(q, k, v, captures, q, torch.zeros(4, 1, 290), q, None)
    hulls = launched.found["hull_ptr"].view(4, -1, 2)
    s = torch.zeros(4, 1, 290, 300)
    assert spec.mask is not None
    readings = reference.read_captures(spec, captures, s)
    kept = reference.kept(spec.mask, reference.environment(spec, s), readings, s).expand_as(s)[:, 0]
    rows = torch.arange(290)
    for block, part in enumerate(kept.split(128, 2)):
        some = part.any(2)
        begin, end = hulls[:, min(block, hulls.shape[1] - 1)].T[:, :, None]
        assert not (some & ((rows < begin) | (rows >= end))).any()
        if name in ("right padding", "left padding", "contiguous documents"):
            first, last = torch.where(some, rows, 290).amin(1), torch.where(some, rows + 1, 0).amax(1)
            assert torch.equal(begin[:, 0], first.int()) and torch.equal(end[:, 0], last.int())


@pytest.mark.parametrize(("name", "width"), [("causal", 64), ("window", 72), ("padding", 128)])
def test_gradients_are_written_into_parts_of_one_tensor(name: str, width: int, tmp_path: Path) -> None:
    """The same numbers as in memory of their own, in every column, by TMA too."""
    places = Places(width, Heads(0, width, 2), Heads(2 * width, 2 * width, 1), Heads(3 * width, width, 1))
    sizes = Shape(width, width, 150, 150, 1, "group", "bshd")
    spec = specification(name, sizes, torch.bfloat16, "zero")
    captures = captured(name, sizes, spec)
    q, k, v = unpacked(torch.randn(2, 150, places.columns).to(torch.bfloat16), places)
    out, lse = forward(spec, (q, k, v), captures)
    dout = torch.randn_like(out)
    text = source(spec, width, width, q.dtype, "hopper:64x128s2", [False] * len(captures))
    module = emulated(text, tmp_path)
    whole = torch.full((2, 150, places.columns), float("nan"), dtype=torch.bfloat16)
    into = unpacked(whole, places)
    found = module.launch(q, k, v, captures, out, lse, dout, None, into)
    assert all(a is b for a, b in zip(found, into, strict=True)) and not whole.isnan().any()
    assert_input_gradients_within_budget(spec, (q, k, v), captures, found, dout)
