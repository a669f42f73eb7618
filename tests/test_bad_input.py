"""Bad and unusual input: clear errors that name what, where and what to do; nothing is lost, nothing is changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.errors import CaptureError, FxoptWarning, OptionError, UnknownPassError, UnsupportedTorchError
from fxopt.passes import FuseAttention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v


def compiled(function: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="fxopt", options={"base": "eager", **options})


def test_old_torch_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UnsupportedTorchError, match=r"needs torch 2\.11 or newer, found 2\.5\.1.*upgrade"):
        fxopt.optimize(nn.Linear(2, 2))
    with pytest.raises(UnsupportedTorchError):
        fxopt.capture(attention, (torch.ones(1, 1, 2, 2),) * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowr": "triton"}, "did you mean 'lower'.*lower, verify, passes, base, strict, inductor"),
        ({"lower": "cuda"}, "lower='cuda'.*auto, triton, sdpa, aten"),
        ({"verify": "yes"}, "structural, numeric"),
        ({"base": "xla"}, "inductor, aot_eager, eager"),
        ({"strict": "no"}, "True or False"),
        ({"passes": "fuse-attention"}, "list of pass names"),
        ({"inductor": 3}, "mapping"),
        ({"passes": 3}, "list of pass names"),
        ({"passes": FuseAttention()}, "list of pass names"),
        ({"passes": [FuseAttention]}, "not a pass instance"),
    ],
)
def test_unknown_options_list_the_valid_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"(?i){message}"):
        fxopt.optimize(nn.Linear(2, 2), **options)
    with pytest.raises(Exception, match=f"(?i)OptionError: .*{message}"):
        compiled(attention, **options)(*[torch.ones(1, 1, 2, 2)] * 3)


def test_unknown_pass_lists_the_known_ones() -> None:
    with pytest.raises(UnknownPassError, match=r"did you mean 'fuse-attention'.*contractions.*fuse-attention.*softmax"):
        fxopt.rewrite(nn.Linear(2, 2), (torch.ones(1, 2),), passes=["fuse-atention"])


def test_the_backend_refuses_what_does_not_exist_instead_of_leaving_the_graph_alone() -> None:
    q = torch.ones(1, 1, 2, 2)
    with pytest.raises(Exception, match=r"UnknownPassError: there is no pass called 'xyz'\. The passes are: centre"):
        compiled(attention, passes=["xyz"])(q, q, q)
    with pytest.raises(Exception, match="no setting 'max_autotun'; did you mean 'max_autotune'"):
        compiled(attention, base="inductor", inductor={"max_autotun": True})(q, q, q)
    with pytest.raises(Exception, match="give a mapping of names to values"):
        torch.compile(attention, backend="fxopt", options=[1])(q, q, q)  # type: ignore[call-overload]


def test_passes_are_a_list_everywhere() -> None:
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    program = fxopt.capture(linear, (x,))
    calls: list[Callable[[Any], Any]] = [
        lambda passes: fxopt.explain_program(program, passes),
        lambda passes: fxopt.rewrite(linear, (x,), passes=passes),
        lambda passes: fxopt.prepare(linear, (x,), passes=passes),
        lambda passes: program.dump("nowhere", passes=passes),
    ]
    for call in calls:
        for wrong in ("fuse-attention", 3, FuseAttention()):
            with pytest.raises(OptionError, match="give a list of pass names or instances"):
                call(wrong)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(OptionError, match=r"nn\.Module"):
        fxopt.optimize(3)
    for wrong in (3, nn.Linear):
        with pytest.raises(OptionError, match="a model that can be called"):
            fxopt.capture(wrong, (2, 2))  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="a model that can be called"):
            fxopt.explain(wrong, 2, 2)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"takes an nn\.Module, not function"):
        fxopt.rewrite(attention, ())  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="tuple of positional arguments, not Tensor"):
        fxopt.capture(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[arg-type]


class Branches(nn.Module):
    """Control flow that depends on data: no single graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_without_a_single_graph_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"Branches can't be captured as one graph(.|\n)*test_bad_input\.py"):
        fxopt.capture(Branches(), (torch.ones(3),))


class Cache:
    """Something that holds a tensor, and that torch.export does not know."""

    def __init__(self, held: Tensor) -> None:
        self.held = held


class Cached(nn.Module):
    """A model that returns one, as transformers' decoders do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        return x + 1, Cache(x)


def test_a_result_of_an_unknown_type_is_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError, match=r"Cached can't be captured(.|\n)*use_cache=False(.|\n)*Cache'> in output"):
        fxopt.capture(Cached(), (torch.ones(3),))


def test_a_graph_break_is_followed_by_the_backend() -> None:
    x = torch.ones(3)
    assert torch.equal(compiled(Branches())(x), Branches()(x))


def test_a_graph_that_cannot_be_retraced_is_left_alone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise CaptureError("the graph holds something that a retrace would lose")

    monkeypatch.setattr(backend, "from_dynamo", broken)
    q = torch.randn(1, 2, 3, 4)
    with pytest.warns(FxoptWarning, match=r"left a graph as it is .*would lose"):
        actual = compiled(attention)(q, q, q)
    assert torch.equal(actual, attention(q, q, q))
    with pytest.raises(Exception, match="would lose"):
        compiled(attention, strict=True)(q, q, q)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 1, 1, 1)])
def test_empty_and_single_element_axes(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape)
    torch.testing.assert_close(compiled(attention)(q, q, q), attention(q, q, q), equal_nan=True)


def test_no_keys_at_all() -> None:
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 0, 4)
    torch.testing.assert_close(compiled(attention)(q, k, k), attention(q, k, k), equal_nan=True)


def test_non_contiguous_operands() -> None:
    q = torch.randn(3, 4, 5, 8)[:, ::2, 1:, ::2]
    k = torch.randn(4, 2, 4, 3).permute(3, 1, 2, 0)
    for lower in ("aten", "sdpa"):
        torch.testing.assert_close(compiled(attention, lower=lower)(q, k, k), attention(q, k, k))


def test_integer_operands_are_left_to_eager() -> None:
    def integers(q: Tensor) -> Tensor:
        return (q @ q.transpose(-2, -1)).float().softmax(-1) @ q.float()

    q = torch.arange(24).reshape(1, 2, 3, 4) % 3
    report = fxopt.explain(integers, q)
    assert report.count("attention") == 0
    assert torch.equal(compiled(integers)(q), integers(q))


@pytest.mark.parametrize("dtypes", ["float32 float64 float64", "float32 float32 bfloat16", "bfloat16 float32 float32"])
def test_mixed_dtypes_fail_as_in_eager(dtypes: str) -> None:
    operands = [torch.randn(1, 2, 3, 4, dtype=getattr(torch, name)) for name in dtypes.split()]
    with pytest.raises(RuntimeError, match=r"(?i)type"):
        attention(*operands)
    with pytest.raises(RuntimeError, match=r"(?i)type"):
        compiled(attention)(*operands)


def test_mixed_dtypes_fail_under_autocast_where_it_leaves_them_so() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=r"(?i)type"):
        compiled(attention)(q, k, k)


class Hostile(nn.Module):
    """Names that would end a string, a line or a program if they reached generated code."""

    NAMES = ('quote"', "line\nbreak", "уникод", "class", "a; import os", "x'y", "{brace}")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(4, 4)))
            self.add_module(f"module {name}", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.NAMES:
            x = attention(x, getattr(self, f"module {name}")(x), x) + x @ getattr(self, name)
        return x


def test_hostile_names_in_every_entry(tmp_path: Path) -> None:
    model, x = Hostile(), torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(compiled(model)(x), model(x))
    rewritten = fxopt.rewrite(model, (x,))
    torch.testing.assert_close(rewritten(x), model(x))
    assert list(rewritten.state_dict()) == list(model.state_dict())
    report = fxopt.explain(model, x)
    assert report.count("attention") == len(Hostile.NAMES)
    folder = fxopt.capture(model, (x,)).dump(tmp_path / "dump")
    last = sorted(folder.glob("[0-9]*.py"))[-1]
    subprocess.run([sys.executable, str(last)], check=True, capture_output=True, timeout=120)


def test_the_users_model_is_not_changed() -> None:
    model, x = Hostile(), torch.randn(1, 2, 3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = model.forward
    fxopt.explain(model, x)
    rewritten = fxopt.rewrite(model, (x,))
    with torch.no_grad():
        for parameter in rewritten.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.forward == forward and type(model) is Hostile
