"""What dtypes hold: positions are read as the integers they are up to the last number that is exact, not beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxopt.analysis.domain import Domain
from fxopt.analysis.linear import LONGEST, Bounds
from fxopt.analysis.values import apply, compared, converted, holds
from fxopt.codegen.expression import evaluate
from fxopt.ir.expression import parse
from tests.analysis.test_index import captured, check, operands

BF16, F16 = torch.bfloat16, torch.float16
#: A mask, made of the positions of rows and of keys.
Mask = Callable[[Tensor, Tensor], Tensor]
CAUSAL = parse("j <= i")


def ones(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ones(x.numel(), dtype=dtype).cumsum(0, dtype=dtype).view(x.shape)


def arange(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.arange(x.numel(), dtype=dtype).view(x.shape)


#: Causal masks, and the longest sequence for which they are.
LIMITS: dict[str, tuple[Mask, int]] = {
    "bf16 to float": (lambda i, j: j.to(BF16).float() <= i.to(BF16).float(), 257),
    "bf16 to double": (lambda i, j: j.to(BF16).double() <= i.to(BF16).double(), 257),
    "bf16 to integers": (lambda i, j: j.to(BF16).long() <= i, 257),
    "bf16 compared": (lambda i, j: j.to(BF16) <= i.to(BF16), 257),
    "bf16 from float": (lambda i, j: j.float().to(BF16).float() <= i, 257),
    "counted in bf16": (lambda i, j: arange(j, BF16).float() <= arange(i, BF16).float(), 257),
    "summed in bf16": (lambda i, j: ones(j, BF16).float() <= i + 1, 256),
    "subtracted in bf16": (lambda i, j: (j.to(BF16) - i.to(BF16)).float() <= 0, 257),
    "moved in bf16": (lambda i, j: (j.to(BF16) + 56).float() <= i + 56, 201),
    "doubled in bf16": (lambda i, j: (j.to(BF16) * 2).float() <= 2 * i, 257),
    "scaled sum in bf16": (lambda i, j: torch.add(j.to(BF16), j.to(BF16), alpha=2).float() <= 3 * i, 89),
    "chosen in bf16": (lambda i, j: torch.where(j < 3, j.to(BF16), j.to(BF16)).float() <= i, 257),
    "float16 to float": (lambda i, j: j.to(F16).float() <= i.to(F16).float(), 2049),
    "float32": (lambda i, j: (j + (2**24 - 40)).float() <= (i + (2**24 - 40)).float(), 41),
    "float32 to integers": (lambda i, j: (j.float() + (2**24 - 40)).long() <= i + (2**24 - 40), 41),
    "int32": (lambda i, j: j.int() * 200000000 <= i.int() * 200000000, 11),
    "int32 from int64": (lambda i, j: (j * 200000000).int() <= i.int() * 200000000, 11),
    "int32 negated": (lambda i, j: -(j.int() * 200000000) >= -(i.int() * 200000000), 11),
    "int32 scaled sum": (lambda i, j: torch.add(j.int(), j.int(), alpha=99999999) <= i.int() * 100000000, 22),
    "int64": (lambda i, j: j * 2**40 * 2**22 <= i * 2**40 * 2**22, 2),
    "int8": (lambda i, j: j.float().to(torch.int8).long() <= i, 128),
}


def build(mask: Mask) -> Callable[..., Tensor]:
    return lambda q, k: mask(torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None])


@pytest.mark.parametrize("beyond", [0, 1], ids=["exact", "beyond"])
@pytest.mark.parametrize("name", LIMITS)
def test_causal_up_to_the_last_exact_position(name: str, beyond: int) -> None:
    mask, longest = LIMITS[name]
    size = longest + beyond
    program, lifted = captured(build(mask), (), size, size, None)
    assert (lifted.expr == CAUSAL) is not bool(beyond)
    check(program, lifted, operands(size, size), build(mask)(*operands(size, size)))


@pytest.mark.parametrize("beyond", [0, 1], ids=["exact", "beyond"])
@pytest.mark.parametrize("name", ["bf16 to float", "moved in bf16", "float16 to float", "int32", "summed in bf16"])
def test_symbolic_lengths_are_causal_where_the_longest_is(name: str, beyond: int) -> None:
    mask, longest = LIMITS[name]
    size = Dim("size", min=4, max=longest + beyond)
    program, lifted = captured(build(mask), (), 7, 7, ({2: size}, {2: size}))
    assert (lifted.expr == CAUSAL) is not bool(beyond)
    longest = min(longest + beyond, 300)
    check(program, lifted, operands(longest, longest), build(mask)(*operands(longest, longest)))


@pytest.mark.parametrize("name", ["bf16 to float", "float16 to float", "bf16 compared"])
def test_nothing_is_exact_in_half_precision_for_any_length(name: str) -> None:
    size = Dim("size", min=4)
    _, lifted = captured(build(LIMITS[name][0]), (), 7, 7, ({2: size}, {2: size}))
    assert lifted.expr != CAUSAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_lengths_without_a_limit_stay_exact_in_wide_dtypes(dtype: torch.dtype) -> None:
    size = Dim("size", min=4)
    build_wide = build(lambda i, j: j.to(dtype) <= i.to(dtype))
    _, lifted = captured(build_wide, (), 7, 7, ({2: size}, {2: size}))
    assert lifted.expr == CAUSAL


#: Almost causal, whatever the length: rounding of reals, and numbers that half precision doesn't have.
ROUNDED: dict[str, Mask] = {
    "there and back by a quotient": lambda i, j: j.float() / 49 * 49 <= i.float(),
    "there and back to integers": lambda i, j: (j.float() / 49 * 49).long() <= i,
    "a number that bf16 rounds": lambda i, j: (j.to(BF16) * 3 + 257).float() <= 3 * i + 257,
    "a number that bf16 rounds, compared": lambda i, j: j.to(BF16) + i.to(BF16) < 257,
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_rounded_is_not_followed(name: str) -> None:
    program, lifted = captured(build(ROUNDED[name]), (), 200, 200, None)
    assert any(leaf.op == "capture" for leaf in lifted.expr.leaves)
    check(program, lifted, operands(200, 200), build(ROUNDED[name])(*operands(200, 200)))


def ids(largest: int) -> Tensor:
    return torch.tensor([[largest, largest - 1, 1, 2], [0, largest - 3, largest - 2, 0]])


#: Comparisons of captured integers that rounding changes.
CAPTURED: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "bf16": (lambda x, y: x.to(BF16).float() == y.to(BF16).float(), ids(300)),
    "float16": (lambda x, y: x.to(F16) <= y.to(F16), ids(2060)),
    "float32": (lambda x, y: x.float() == y.float(), ids(2**25)),
    "float64": (lambda x, y: x.double() == y.double(), ids(2**60)),
    "float32 and back": (lambda x, y: x.float().long() == y, ids(2**25)),
    "narrowed": (lambda x, y: x.int() == y.int(), ids(2**32 + 1)),
    "reals narrowed": (lambda x, y: x.to(BF16) == y.to(BF16), ids(300).float() / 7),
    "reals narrowed and back": (lambda x, y: x.to(BF16).float() > 42.5, ids(300).float() / 7),
    "a small number": (lambda x, y: x.float() > 1.0, ids(2**25)),
    "positions": (lambda x, y: x.float() <= torch.arange(4).float() + 2**24 - 5, ids(2**24)),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_numbers_are_rounded_as_written(name: str) -> None:
    compare, data = CAPTURED[name]

    def mask(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return compare(x[:, None, :, None], x[:, None, None, :])

    program, lifted = captured(mask, (data,), 4, 4, None)
    inputs = (*operands(4, 4), data)
    check(program, lifted, inputs, mask(*inputs))


def bounds(rows: Any = 100, columns: Any = 100) -> Bounds:
    return Bounds(Domain(2, 3, rows, columns), LONGEST)


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("float((j + 157))", BF16, True),
        ("float((j + 158))", BF16, False),
        ("float((j - 256))", BF16, True),
        ("float((j - 257))", BF16, False),
        ("where(j <= i, float((j * 3)), 5000.0)", BF16, False),
        ("where(j <= i, float((j * 2)), 5000.0)", BF16, True),
        ("float((j * i))", F16, False),
        ("float(((j % 7) * (i // 50)))", BF16, True),
        ("float(c0)", BF16, False),
        ("float(c0)", torch.float32, True),
        ("float(j)", torch.float8_e4m3fn, False),
        ("j", torch.int8, True),
        ("(j + 29)", torch.int8, False),
        ("(j - i)", torch.uint8, False),
        ("(c0 + 1)", torch.int32, True),
        ("(float(j) * 0.5)", BF16, True),
    ],
)
def test_what_a_dtype_holds(text: str, dtype: torch.dtype, expected: bool) -> None:
    assert holds(dtype, parse(text), bounds()) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(i * j)", (0, 99 * 99)),
        ("((i - j) * 3)", (-297, 297)),
        ("((i - 200) * (j - 1))", (-200 * 98, 200)),
        ("(i // (j + 1))", (0, 99)),
        ("((i - 50) // (j + 10))", (-5, 4)),
        ("(i % (j + 2))", (0, 100)),
    ],
)
def test_bounds_of_products_and_quotients(text: str, expected: tuple[int, int]) -> None:
    low, high = bounds().between(parse(text))
    values: Any = evaluate(parse(text), {"i": torch.arange(100)[:, None], "j": torch.arange(100)}, [])
    assert [low, high] == [*expected]
    assert low <= int(values.min()) and int(values.max()) <= high


def test_rounded_factors_do_not_cancel() -> None:
    third = apply("div", (parse("float(j)"), parse("7.0")), torch.float32)
    assert apply("mul", (third, parse("7.0")), torch.float32).op != "float"
    assert apply("mul", (parse("float(j)"), parse("1.0")), torch.float32) == parse("float(j)")


def test_one_exact_side_decides_a_comparison() -> None:
    numbers, small, large = parse("float(c0)"), parse("float(j)"), parse("float((j + 16777200))")
    assert compared("le", numbers, small, torch.float32, bounds()) == parse("c0 <= j")
    assert compared("le", numbers, large, torch.float32, bounds()) is None
    assert compared("le", numbers, numbers.put(parse("c0"), parse("c1")), torch.float32, bounds()) is None


def test_what_was_rounded_is_not_exact_in_a_wider_dtype() -> None:
    product = parse("(float(j) * 0.3)")
    assert converted(product, BF16, torch.float32, bounds()) is None
    assert converted(product, torch.float32, BF16, bounds()) == product
    assert converted(parse("c0"), torch.float32, BF16, bounds()) is None
    assert converted(parse("c0"), BF16, torch.float32, bounds()) == parse("c0")
