from __future__ import annotations

import torch
from torch import Tensor, nn

from fxopt.testing import draw, evaluate, together


def test_evaluate_keeps_strides_and_the_callers_values() -> None:
    seen: list[tuple[int, ...]] = []

    def program(x: Tensor, y: Tensor) -> Tensor:
        seen.extend((x.stride(), y.stride()))
        return x.mul_(2) + y

    x, y = torch.ones(4, 3).t(), torch.ones(3, 1).expand(3, 4)
    evaluate(program, x, y)
    assert seen == [x.stride(), y.stride()]
    assert float(x.sum()) == 12


def test_evaluate_differentiates_arguments_and_parameters() -> None:
    module = nn.Linear(3, 2, bias=False)
    x = draw((4, 3)).requires_grad_()
    result = evaluate(module, x)
    assert list(result.gradients) == ["args[0]", "parameters.weight"]
    assert not result.outputs.requires_grad
    assert x.grad is None and module.weight.grad is None


def test_evaluate_strips_the_prefix_of_compiled_modules() -> None:
    module = nn.Linear(3, 2)
    compiled = torch.compile(module, backend="eager")
    x = draw((4, 3))
    assert list(evaluate(compiled, x).gradients) == list(evaluate(module, x).gradients)


def test_evaluate_leaves_out_unused_inputs() -> None:
    x, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert list(evaluate(lambda x, unused: x * 2, x, unused).gradients) == ["args[0]"]


def test_cotangents_are_equal_in_every_dtype() -> None:
    gradients = [
        evaluate(lambda x: x * 1, torch.ones(50, dtype=dtype, requires_grad=True)).gradients["args[0]"].double()
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    assert len(torch.unique(gradients[0])) > 10


def test_together_stacks_the_tensors_of_several_runs() -> None:
    module = nn.Linear(3, 2, bias=False)
    runs = [evaluate(lambda x: {"y": module(x), "n": x.shape[0]}, torch.full((4, 3), float(n))) for n in range(5)]
    whole = together(runs)
    assert whole.outputs["n"] == 4 and whole.outputs["y"].shape == (5, 4, 2)
    assert all(torch.equal(whole.outputs["y"][n], run.outputs["y"]) for n, run in enumerate(runs))
    gradients = together([evaluate(module, torch.full((4, 3), float(n))) for n in range(2)]).gradients
    assert list(gradients) == ["parameters.weight"] and gradients["parameters.weight"].shape == (2, 2, 3)
