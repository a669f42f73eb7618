"""One module serves every length: its numbers at lengths around the edges of blocks, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention import reference
from fxopt.codegen.attention.backward import kernel as backward
from fxopt.codegen.attention.portable.kernel import KIND, read_config, source
from fxopt.codegen.attention.split import kernel as split
from fxopt.ir.attention import AttentionSpec
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, captured, operands, specification
from tests.codegen.gradients import assert_gradients_within_budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
HALF = torch.bfloat16
WIDTH = 24
#: Rows and keys in the order in which the one module meets them: around blocks of 16 and 32, and crossed.
LENGTHS = ((33, 33), (1, 1), (15, 15), (16, 16), (17, 40), (50, 31), (32, 64), (2, 70))
#: Kinds of bounds and captured tensors whose sizes follow the lengths.
NAMES = ("plain", "causal", "window", "prefix", "dilated", "padding", "alibi", "tile-bias", "causal-band")


def shapes(largest_rows: int = 64) -> list[Shape]:
    return [Shape(WIDTH, WIDTH, rows, keys, 1, heads=2) for rows, keys in LENGTHS if rows <= largest_rows]


def check(module: ModuleType, name: str, spec: AttentionSpec, sizes: Shape) -> None:
    q, k, v = operands(sizes, HALF)
    captures = captured(name, sizes, spec)
    wide = [c.double() if c.is_floating_point() else c for c in captures]
    wide_spec = dataclasses.replace(spec, out_dtype=torch.float64)
    exact = reference.attention(q.double(), k.double(), v.double(), wide, str(wide_spec))
    out, lse = module.launch(q, k, v, captures, True)
    assert_within_budget(out, reference.attention(q, k, v, captures, str(spec)), exact)
    expected = torch.logsumexp(reference.logits(spec, q.double(), k.double(), wide), -1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-3, atol=1e-3)


def spec_of(name: str) -> AttentionSpec:
    return specification(name, Shape(WIDTH, WIDTH, 1, 1), HALF, "zero")


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_at_every_length(name: str) -> None:
    spec = spec_of(name)
    module = import_source(KIND, source(spec, WIDTH, WIDTH, HALF, read_config("16x32w4s2")))
    for sizes in shapes():
        check(module, name, spec, sizes)


@pytest.mark.parametrize("name", NAMES)
def test_few_queries_over_every_number_of_keys(name: str) -> None:
    spec = spec_of(name)
    module = import_source(split.KIND, split.source(spec, WIDTH, WIDTH, HALF, "split:32w4s3x2"))
    for sizes in shapes(largest_rows=17):
        check(module, name, spec, sizes)


def gradients(
    forward: ModuleType, module: ModuleType, inputs: Sequence[Tensor], captures: list[Tensor], dout: Tensor
) -> list[Tensor]:
    out, lse = forward.launch(*inputs, captures, True)
    found: list[Tensor] = module.launch(*inputs, captures, out, lse, dout, None)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_at_other_lengths(name: str) -> None:
    """Each kind at every other length, which are all of them for two kinds that follow one another."""
    spec = spec_of(name)
    config = backward.read_backward("16x32w4s2-32x16w4s2")
    wanted = [c.dtype.is_floating_point for c in spec.captures]
    forward = import_source(KIND, source(spec, WIDTH, WIDTH, HALF, read_config("16x32w4s2")))
    module = import_source(backward.KIND, backward.source(spec, WIDTH, WIDTH, HALF, config, wanted))
    for sizes in shapes()[NAMES.index(name) % 2 :: 2]:
        inputs, captures = operands(sizes, HALF), captured(name, sizes, spec)
        dout = torch.randn(sizes.batch, sizes.heads, sizes.rows, WIDTH).to(HALF)
        found = gradients(forward, module, inputs, captures, dout)
        assert_gradients_within_budget(spec, inputs, captures, found, dout)
