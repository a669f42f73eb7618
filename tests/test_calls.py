"""The calls that a rewritten module serves: how they may be written, and that no other gets a wrong answer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.export import Dim

import fxopt
from fxopt.errors import CallError, CaptureError, FxoptWarning, OptionError
from fxopt.ir.program import Program

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
LONGER = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """A norm, attention, and a mean whose divisor is a size of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.drop = nn.LayerNorm(8), nn.Linear(8, 24), nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 0.25, *, flip: bool = False) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.mT * scale
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        mixed: Tensor = (self.drop(scores.softmax(-1)) @ v).sum(1) / x.shape[1]
        return -mixed if flip else mixed


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """TorchDynamo does not enter code again that raised while it was traced, as a refused call does."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


MASK = torch.zeros(5, 5, dtype=torch.bool).triu(1) | torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_a_call_may_be_written_in_any_way(model: Model) -> None:
    fast = fxopt.rewrite(model, (X,), {"scale": 0.5, "mask": MASK})
    expected = model(X, MASK, 0.5)
    for result in (
        fast(X, scale=0.5, mask=MASK),
        fast(X, mask=MASK, scale=0.5),
        fast(X, MASK, 0.5),
        fast(mask=MASK, x=X, scale=0.5, flip=False),
    ):
        torch.testing.assert_close(result, expected)


def test_what_has_its_default_may_be_given_or_not(model: Model) -> None:
    plain, full = fxopt.rewrite(model, (X,)), fxopt.rewrite(model, (X, None, 0.25))
    for fast in (plain, full):
        for result in (fast(X), fast(X, None), fast(x=X, scale=0.25), fast(X, None, 0.25, flip=False)):
            torch.testing.assert_close(result, model(X))


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another length": (lambda f: f(LONGER), r"argument 'x' has the shape \[2, 7, 8\].*for \[2, 5, 8\].*dynamic_shapes"),
    "another rank": (lambda f: f(X[0]), r"argument 'x' has the shape \[5, 8\]"),
    "another dtype": (lambda f: f(X.double()), r"argument 'x' is of torch\.float64.*for torch\.float32"),
    "another number": (lambda f: f(X, scale=0.5), "without 'scale'"),
    "a mask": (lambda f: f(X, MASK), "without 'mask'"),
    "another flag": (lambda f: f(X, flip=True), "without 'flip'"),
    "nothing": (lambda f: f(), "with 'x'"),
    "no tensor": (lambda f: f("x"), "argument 'x' is 'x'.*for a tensor"),
    "an unknown name": (lambda f: f(X, other=3), "without 'other'"),
    "too many": (lambda f: f(X, None, 0.25, False, 1), "calls of the form"),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_call_is_refused(model: Model, name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(CallError, match=message):
        call(fxopt.rewrite(model, (X,)))


def test_constants_that_were_given_are_held_to(model: Model) -> None:
    fast = fxopt.rewrite(model, (X,), {"scale": 0.5, "flip": True})
    torch.testing.assert_close(fast(X, scale=0.5, flip=True), model(X, scale=0.5, flip=True))
    for scale, flip, message in ((0.25, True, "'scale' is 0.25.*for 0.5"), (0.5, 1, "'flip' is 1.*for True")):
        with pytest.raises(CallError, match=message):
            fast(X, scale=scale, flip=flip)
    with pytest.raises(CallError, match=r"argument 'scale' is 0\.25"):
        fast(X, flip=True)


def test_symbolic_sizes_are_held_to_their_bounds_and_to_each_other() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, rest: dict[str, list[Tensor]]) -> Tensor:
            return (a + rest["b"][0]) / a.shape[0]

    length, twice = Dim("length", min=3, max=10), Dim("width", max=64)
    example = (torch.ones(4, 6), {"b": [torch.ones(4, 6)]})
    fast = fxopt.rewrite(Sum(), example, dynamic_shapes=({0: length, 1: twice}, {"b": [{0: length, 1: twice}]}))
    for n in (3, 10):
        x = torch.ones(n, 5)
        torch.testing.assert_close(fast(x, {"b": [x]}), 2 * x / n)
    for n in (2, 11):
        with pytest.raises(CallError, match=rf"argument 'a' has the shape \[{n}, 5\].*3 ≤ \w+ ≤ 10"):
            fast(torch.ones(n, 5), {"b": [torch.ones(n, 5)]})
    with pytest.raises(CallError, match=r"argument 'rest'\['b'\]\[0\] has the shape \[1, 5\]"):
        fast(torch.ones(4, 5), {"b": [torch.ones(1, 5)]})


class Branching(nn.Module):
    """Its graph is of the sizes that it was captured with."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        doubled = y.shape[0] == 2 * x.shape[0] and x.shape[0] % 2 == 0
        return x * 2 if doubled else x * 3


@pytest.mark.parametrize("swapped", [False, True])
def test_sizes_made_of_others_and_what_the_model_asked_of_them_are_held_to(swapped: bool) -> None:
    half: Any = Dim("half", max=25)
    shapes = {"x": {0: 2 * half}, "y": {0: 4 * half}}
    given = {"x": torch.ones(4, 3), "y": torch.ones(8, 3)}
    if swapped:
        given, shapes = dict(reversed(given.items())), dict(reversed(shapes.items()))
    fast = fxopt.rewrite(Branching().eval(), (), given, dynamic_shapes=shapes)
    assert float(fast(x=torch.ones(6, 3), y=torch.ones(12, 3)).sum()) == 36
    with pytest.raises(CallError, match="argument 'y' has the shape"):
        fast(x=torch.ones(6, 3), y=torch.ones(13, 3))

    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] % 4 == 0 else x * 3

    automatic = torch.export.Dim.AUTO
    even = fxopt.rewrite(Even().eval(), (torch.ones(8, 3),), dynamic_shapes=({0: automatic},))
    assert float(even(torch.ones(12, 3)).sum()) == 72
    with pytest.raises(CallError, match=r"rewritten for sizes where Eq\(Mod\(\w+, 4\), 0\), not for \w+ = 6"):
        even(torch.ones(6, 3))


def test_under_autocast_either_dtype_is_taken() -> None:
    linear = nn.Linear(4, 4).eval()
    fast, x = fxopt.rewrite(linear, (torch.randn(2, 4),)), torch.randn(2, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), linear(x))
    with pytest.raises(CallError, match=r"is of torch.bfloat16"):
        fast(x)


def test_a_module_of_several_dtypes_is_rewritten_when_any_changes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.late(self.early(x.to(self.early.weight.dtype)).to(self.late.weight.dtype))
            return y

    assert fxopt.rewrite(Mixed().eval(), (torch.randn(2, 4),)).bfloat16()(torch.randn(2, 4)).dtype is torch.bfloat16


def test_compiled_and_exported_calls(model: Model) -> None:
    fast = fxopt.rewrite(model, (X,), dynamic_shapes=({1: Dim("length", max=99)},))
    compiled = torch.compile(fast, backend="eager", fullgraph=True, dynamic=True)
    exported = torch.export.export(fast, (X,), dynamic_shapes=(({1: Dim("length", max=99)},),)).module()
    for x in (X, LONGER):
        for call in (fast, compiled, exported):
            torch.testing.assert_close(call(x), model(x))
    with pytest.raises(Exception, match=r"argument 'x' has the shape"):
        torch.compile(fxopt.rewrite(model, (X,)), backend="eager")(LONGER)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_that_was_moved_computes_in_its_new_dtype(model: Model, dtype: torch.dtype) -> None:
    fast, moved = fxopt.rewrite(model, (X,)).to(dtype), copy.deepcopy(model).to(dtype)
    result, expected = fast(X.to(dtype)), moved(X.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X.to(dtype)), expected)
    with pytest.raises(CallError, match="convert the tensor"):
        fast(X)


def test_the_report_says_what_was_done(model: Model) -> None:
    fast = fxopt.rewrite(model, (X,))
    assert fast.report.count("attention") == fast.report.count("norm") == 1
    assert fast.train().report.count("norm", "kept") == 1, "weights are folded in evaluation only"
    assert fxopt.rewrite(model, (X,), passes=["no-ops"]).report.count("attention", "kept") == 1


@pytest.mark.filterwarnings("error")
def test_copies_and_files(model: Model) -> None:
    fast = fxopt.rewrite(model, (X,))
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    others: list[Any] = [copy.deepcopy(fast), torch.load(file, weights_only=False)]
    for other in others:
        torch.testing.assert_close(other(X), model(X))
        with torch.no_grad():
            other.qkv.weight.zero_()
            other.qkv.bias.zero_()
            assert not other(X).any()
    torch.testing.assert_close(fast(X), model(X))
    with pytest.raises(OptionError, match="a frozen module can't be pickled"):
        torch.save(copy.deepcopy(fast).freeze(), io.BytesIO())


def test_a_copy_is_compiled_as_one_graph_before_its_first_call(model: Model) -> None:
    fast = fxopt.rewrite(model, (X,))
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(fast), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), fast(X))


class Tied(nn.Module):
    """Modules, parameters and buffers under two names, and under names that a rewritten module has itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.program = nn.Linear(8, 8)
        self.weight = self.report = nn.Parameter(torch.randn(8))
        self.register_buffer("freeze", torch.randn(8))
        self.register_buffer("twice", self.get_buffer("freeze"))
        self.register_parameter("absent", None)
        self.folded_weights = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.program(self.folded_weights(self.a(x))) * self.weight
        return y + self.get_buffer("freeze")


def test_names_of_the_model_whatever_they_are() -> None:
    net = Tied().eval()
    fast = fxopt.rewrite(net, (X,))
    assert list(fast.state_dict()) == list(net.state_dict())
    assert fast._parameters["weight"] is fast._parameters["report"] and fast._modules["a"] is fast._modules["program"]
    torch.testing.assert_close(fast(X), net(X))
    other = Tied().eval()
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(X), other(X))
    assert isinstance(fast.program(), Program)


@torch.no_grad()
def test_what_was_rewritten_can_be_rewritten(model: Model) -> None:
    once = fxopt.rewrite(model, (X,), passes=["fold-norm-affine"])
    again = fxopt.rewrite(once, (X,))
    assert again.report.count("attention") == 1
    torch.testing.assert_close(again(X), model(X))


@pytest.mark.parametrize("option", ["lower", "base", "inductor"])
def test_rewrite_refuses_options_that_it_would_not_heed(model: Model, option: str) -> None:
    with pytest.raises(OptionError, match=f"no option '{option}' here.*: passes, verify, strict"):
        fxopt.rewrite(model, (X,), **{option: "eager"})  # type: ignore[arg-type]


def test_a_capture_that_fails_names_the_users_line() -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("no such thing")

    with pytest.raises(CaptureError, match=r"LookupError: no such thing\n  at .*test_calls\.py:\d+ in forward\n"):
        fxopt.capture(Raises(), (X,))
    with pytest.raises(CaptureError, match=r"missing a required argument: 'x'$"):
        fxopt.capture(Raises())


def test_a_pass_that_fails_is_named(model: Model) -> None:
    class Breaks:
        name, tier, requires = "breaks", "exact", ()

        def run(self, program: Program) -> fxopt.PassResult:
            next(iter(program.graph.find_nodes(op="call_function"))).args = ()
            return fxopt.PassResult(True)

    with pytest.warns(FxoptWarning, match="pass breaks was rolled back"):
        fast = fxopt.rewrite(model, (X,), passes=["no-ops", Breaks()])  # type: ignore[list-item]
    torch.testing.assert_close(fast(X), model(X))
    assert [summary.name for summary in fast.report.passes if summary.failure] == ["breaks"]
