"""Padded batches in the Hopper kernel on the GPU: any filling is right, and the order of tiles changes no bit."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import reference
from fxopt.codegen.attention.hopper import kernel as hopper
from fxopt.codegen.attention.operator import attention_forward
from fxopt.ir.attention import EmptyRows
from fxopt.testing import assert_within_budget
from tests.codegen.cases import Shape, operands
from tests.codegen.fillings import FILLINGS, lengths, padded, vectors
from tests.gpu.problems import problem

pytestmark = pytest.mark.gpu
LENGTH = 700


def drawn(filled: tuple[int, ...], rows: bool, width: int = 64) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    sizes = Shape(width, width, LENGTH, LENGTH, 2, batch=len(filled), heads=4)
    return [x.cuda() for x in operands(sizes, torch.bfloat16)], [c.cuda() for c in vectors(filled, LENGTH, rows)]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("number", range(len(FILLINGS)))
def test_any_filling_is_within_the_budget_of_eager(number: int, rows: bool) -> None:
    (q, k, v), captures = drawn(lengths(FILLINGS[number], LENGTH)[:40], rows, 128 if number == 0 else 64)
    spec = padded(rows, get_args(EmptyRows)[(number + rows) % 3])
    asked = problem(spec, q, k, v)
    reason = hopper.objection(asked)
    if reason is not None:
        pytest.skip(reason)
    wide = str(dataclasses.replace(spec, out_dtype=torch.float64))
    exact = reference.attention(q.double(), k.double(), v.double(), captures, wide)
    eager = reference.attention(q, k, v, captures, str(spec))
    lse = torch.logsumexp(reference.logits(spec, q.double(), k.double(), captures), -1)
    others = ("hopper:128x64s2q2", "hopper:64x64s3q3a1", "hopper:64x64s2q1")
    for config in dict.fromkeys((*hopper.candidates(asked), others[number % 3])):
        out, found = attention_forward(q, k, v, captures, str(spec), config, True)
        assert_within_budget(out, eager, exact)
        torch.testing.assert_close(found.double(), lse, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["mixed", "equal", "many"])
def test_the_order_of_a_batch_changes_no_bit(name: str, rows: bool) -> None:
    filled = lengths(name, LENGTH)
    (q, k, v), captures = drawn(filled, rows)
    spec = padded(rows, "zero")
    reason = hopper.objection(problem(spec, q, k, v))
    if reason is not None:
        pytest.skip(reason)
    for config in hopper.candidates(problem(spec, q, k, v)):
        out, lse = attention_forward(q, k, v, captures, str(spec), config, True)
        moved = torch.randperm(len(filled), generator=torch.Generator().manual_seed(1)).cuda()
        others = [x[moved] for x in (q, k, v)]
        again, lse_again = attention_forward(*others, [c[moved] for c in captures], str(spec), config, True)
        assert torch.equal(again, out[moved]) and torch.equal(lse_again, lse[moved])
        for n in range(0, len(filled), 50):
            one = [x[n : n + 1] for x in (q, k, v)]
            alone, _ = attention_forward(*one, [c[n : n + 1] for c in captures], str(spec), config, True)
            assert torch.equal(alone, out[n : n + 1])
