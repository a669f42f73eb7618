"""The Hopper backward against float64: its Gluon kernel emulated, its Triton kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward.hopper.kernel import objection, source
from fxopt.ir.attention import AttentionSpec
from tests.codegen.cases import EXPRESSIONS, Shape, captured, operands, pairwise, specification
from tests.codegen.emulated_gluon import Descriptor, emulated
from tests.codegen.gradients import assert_input_gradients_within_budget

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


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(NAMES, SHAPES, DTYPES))
def test_gradients_are_within_the_budget_of_eager(name: str, shape: str, dtype: str, tmp_path: Path) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, DTYPES[dtype], "zero" if len(shape) % 2 else "nan")
    config = "hopper:64x128s2" if sizes.head_dim > 64 else "hopper:64x128s4"
    for order in ("", "a"):
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


def test_finite_fills_share_the_weight_equally(tmp_path: Path) -> None:
    sizes = Shape(64, 64, 70, 140, batch=2)
    spec = specification("additive-mask", sizes, torch.bfloat16)
    mask = torch.zeros(2, 1, 1, 140, dtype=torch.bfloat16)
    mask[0], mask[1, ..., :90] = -1e30, -1e30
    check(spec, operands(sizes, torch.bfloat16), [mask], "hopper:64x128s2", tmp_path)


def test_nearly_every_expression_without_tiles_is_served() -> None:
    assert set(EXPRESSIONS) - set(NAMES) == {"tile-bias", "swin", "band", "causal-band", "finite-fill"}
