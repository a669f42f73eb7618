"""GELU of half precision, for every value there is, against float64; and where it stands in for the usual one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxopt.codegen.mlp.gelu import decompositions, gelu

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
FORMS = ("none", "tanh")
_FLOOR = 1e-5  # below it, float32 holds too little of 1 + erf for eager to be a measure


def every(dtype: torch.dtype) -> Tensor:
    """All finite values."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[torch.isfinite(values)]


def exact(x: Tensor, form: str) -> Tensor:
    """In float64, without the cancellation that ``1 + erf`` and ``1 + tanh`` have."""
    wide = x.double()
    if form == "none":
        return wide * torch.exp(torch.special.log_ndtr(wide))
    return wide * torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))


def steps(found: Tensor, expected: Tensor) -> Tensor:
    """How many values of the dtype lie between two tensors of it, element by element."""

    def order(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(found) - order(expected)).abs()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_rounded_as_well_as_by_float32(dtype: str, form: str) -> None:
    x = every(DTYPES[dtype])
    truth = exact(x, form)
    rounded, large = truth.to(x.dtype), truth.abs() > _FLOOR
    usual = functional.gelu(x.float(), approximate=form).to(x.dtype)
    found = gelu(x, form)
    assert found.dtype is x.dtype
    off, off_usual = steps(found, rounded)[large], steps(usual, rounded)[large]
    assert int(off.max()) <= 1
    assert int((off > 0).sum()) <= int((off_usual > 0).sum())
    small = (found.double() - truth)[~large].abs().max()
    assert float(small) <= float((usual.double() - truth)[~large].abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(dtype: str, form: str) -> None:
    """As the formula has them: ``−∞·Φ(−∞)`` is no number."""
    found = gelu(torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=DTYPES[dtype]), form)
    assert found.isnan().tolist() == [False, True, True] and found[0] == torch.inf


def operators(x: Tensor, form: str) -> set[str]:
    """The operators that GELU becomes in a graph for ``x``."""
    table = select_decomp_table()
    traced = make_fx(lambda x: functional.gelu(x, approximate=form), {**table, **decompositions(table)})(x)
    return {node.target.name() for node in traced.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("device", "dtype", "ours"), [
    ("cuda", torch.bfloat16, True), ("cuda", torch.float16, True), ("cuda", torch.float32, False),
    ("cpu", torch.bfloat16, False),
])  # fmt: skip
def test_half_precision_on_cuda_alone_is_computed_so(device: str, dtype: torch.dtype, ours: bool, form: str) -> None:
    with FakeTensorMode():
        found = operators(torch.empty(8, device=device, dtype=dtype), form)
    assert ("aten::sigmoid" in found) == ours
    assert bool({"aten::erf", "aten::tanh"} & found) != ours
