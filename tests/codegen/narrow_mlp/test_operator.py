"""``fxopt::mlp_forward`` on the CPU: registration, refusals, configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.codegen.launching import DECOMPOSITIONS
from fxopt.codegen.mlp.gelu import gelu
from fxopt.codegen.mlp.narrow_mlp.config import candidates, read_config
from fxopt.codegen.mlp.narrow_mlp.kernel import source
from fxopt.codegen.mlp.narrow_mlp.operator import mlp_forward
from fxopt.codegen.mlp.narrow_mlp.problem import Problem, objection
from fxopt.codegen.mlp.narrow_mlp.source import pieces
from fxopt.errors import LoweringError
from tests.codegen.narrow_mlp.cases import CASES, Operands

CONFIG = "32x32w4s1"


def operands(name: str = "gelu bf16", out: int = 32) -> Operands:
    return CASES[name].operands(3, 5, width=32, hidden=64, out=out)


@pytest.mark.parametrize("name", ["gelu f16", "silu bf16"])
def test_opcheck(name: str) -> None:
    results = torch.library.opcheck(mlp_forward, (*operands(name), CASES[name].activation, CONFIG))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CASES)
def test_on_the_cpu_it_is_the_meaning(name: str) -> None:
    case, given = CASES[name], operands(name)
    torch.testing.assert_close(mlp_forward(*given, case.activation, CONFIG), case.meaning(given), rtol=0, atol=0)


def test_results_and_their_fakes_agree() -> None:
    given = operands(out=48)
    real = mlp_forward(*given, "gelu", CONFIG)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [None if x is None else mode.from_tensor(x) for x in given]
        fake = mlp_forward(*fakes, "gelu", CONFIG)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_it_has_no_gradients() -> None:
    x, *rest = operands("gelu f16")
    out = mlp_forward(x.requires_grad_(), *rest, "gelu", CONFIG)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


def test_after_autograd_it_is_replaced_by_the_bare_operator() -> None:
    bare = DECOMPOSITIONS[torch.ops.fxopt.mlp_forward.default]
    given = operands()
    torch.testing.assert_close(bare(*given, "gelu", CONFIG), mlp_forward(*given, "gelu", CONFIG))


CHANGES: dict[str, tuple[dict[int, Any], str]] = {
    "dtypes": ({4: torch.zeros(32)}, "several dtypes: torch.bfloat16, torch.float32"),
    "a vector": ({3: torch.zeros(64, dtype=torch.bfloat16)}, "weights of 2 and 1 axes"),
    "widths": ({1: torch.zeros(64, 16, dtype=torch.bfloat16)}, "don't fit one another"),
    "hidden widths": ({3: torch.zeros(32, 32, dtype=torch.bfloat16)}, "don't fit one another"),
    "a bias": ({2: torch.zeros(1, dtype=torch.bfloat16)}, "the bias of up has the shape (1,)"),
    "a residual": ({5: torch.zeros(5, 32, dtype=torch.bfloat16)}, "the residual has the shape (5, 32)"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_operands_that_do_not_belong_together(change: dict[int, Any], reason: str) -> None:
    given = [change.get(n, x) for n, x in enumerate(operands())]
    with pytest.raises(LoweringError, match="lower it to ATen instead") as raised:
        mlp_forward(*given, "gelu", CONFIG)
    assert reason in str(raised.value)


REFUSED = {
    "wide": ({"width": 256}, "rows of 256 elements"),
    "wide results": ({"out": 208}, "rows of 208 elements"),
    "odd": ({"width": 100}, "the input width 100 is no multiple of 16"),
    "odd inside": ({"hidden": 40}, "the hidden width 40 is no multiple of 16"),
    "empty": ({"hidden": 0}, "the hidden width 0"),
    "float64": ({"dtype": torch.float64}, "float64 operands"),
    "an activation": ({"activation": "mish"}, "'mish' is none of"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_kernel_serves_is_said(change: dict[str, Any], reason: str) -> None:
    problem = Problem(**{**vars(CASES["gelu bf16"].problem(32, 64)), **change})
    assert reason in str(objection(problem))
    with pytest.raises(LoweringError, match="lower it to ATen instead"):
        source(problem, CONFIG)


def test_hidden_elements_must_come_in_the_chunks_of_the_configuration() -> None:
    with pytest.raises(LoweringError, match="the hidden width 48 is no multiple of 32"):
        source(CASES["gelu bf16"].problem(32, 48), CONFIG)


@pytest.mark.parametrize("text", ["128x64w8s3", "64x32w4s2r128"])
def test_configurations_are_printed_and_read(text: str) -> None:
    assert str(read_config(text)) == text


@pytest.mark.parametrize("text", ["", "128x64", "128x64w8", "100x64w8s3", "128x64w6s3", "8x64w4s1", "128x8w4s1"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(LoweringError):
        read_config(text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_problem_has_few_configurations_that_fit(architecture: int, dtype: torch.dtype) -> None:
    for width in range(16, 193, 16):
        for hidden in (16, 48, 96, 4 * width):
            problem = Problem(width, hidden, width, "gelu", dtype, True, True, False)
            found = candidates(problem, architecture)
            assert 0 < len(found) <= 3
            for config in found:
                source(problem, config)


def test_widths_come_in_different_powers_of_two() -> None:
    assert [pieces(width) for width in (16, 96, 192, 112)] == [(16,), (64, 32), (128, 64), (64, 32, 16)]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_text_of_gelu_is_the_gelu_of_half_precision(approximate: str) -> None:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    problem = Problem(32, 32, 32, name, torch.bfloat16, False, False, False)
    text = source(problem, CONFIG).partition("def activation(x):")[2].partition("@triton")[0]
    body = text.partition('"""')[2].partition('"""')[2].replace("tl.minimum(x * x,", "torch.clamp_max(x * x,")
    body = body.replace("tl.exp2", "torch.exp2").replace("reciprocal(", "torch.reciprocal(")
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def activation(x):{body}", scope)
    x = torch.linspace(-8, 8, 4001).to(torch.bfloat16)
    torch.testing.assert_close(scope["activation"](x.float()).to(x.dtype), gelu(x, approximate), rtol=0, atol=1e-6)
