"""Generated kernels of linear attention on the GPU, and students with it, end to end."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

import fxopt
from fxopt.codegen.linear_attention.kernel import candidates
from fxopt.codegen.linear_attention.operator import linear_attention_forward
from fxopt.passes import LinearAttention, SimplifiedLinearAttention
from fxopt.testing import assert_within_budget, together
from tests.codegen.linear_cases import CASES, LinearCase, eager, exact, leaves
from tests.linear_attention.models import Causal, Written, inputs, mixer, optimizer_of, train

pytestmark = pytest.mark.gpu
#: Results that are judged together: a case with fewer is drawn more often.
_RESULTS = 2000
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = {
    "swin": LinearCase(32, 32, 49, 49, "pc5", side=7, batch=257, heads=3),
    "vit": LinearCase(64, 64, 196, 196, "pc5", side=14, batch=8, heads=6),
    "pvt": LinearCase(64, 64, 3136, 3136, "pc5", side=56, batch=1, heads=1),
    "long": LinearCase(64, 64, 4099, 4099, "k", batch=1, heads=2),
    "long-causal": LinearCase(64, 64, 4099, 4099, "k", causal=True, batch=1, heads=2),
    "causal-128": LinearCase(128, 128, 1000, 1000, causal=True, heads=4),
    "wide": LinearCase(256, 256, 300, 300),
}
ALL = {**CASES, **LARGE}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_kernels_are_within_the_budget_of_eager(name: str, dtype: torch.dtype) -> None:
    case = ALL[name]
    spec = case.spec(dtype, "bshd")
    found = candidates(spec, (case.rows, case.keys), (case.head_dim, case.value_dim), dtype, case.optional)
    if not found:
        pytest.skip(f"no kernel is generated for {case.head_dim} wide heads of {dtype}")
    draws = max(1, _RESULTS // (case.batch * case.heads * case.rows * case.value_dim))
    for config in found:
        results = [outcomes(case, dtype, str(config), seed) for seed in range(draws)]
        # Together: the largest error of one small result is a matter of luck, eager's too.
        sides = [together(side) for side in zip(*results, strict=True)]
        for n, (actual, usual, exactly) in enumerate(zip(*sides, strict=True)):
            # In float32 it is the terms of a gradient's differences whose rounding shows; they are of this size.
            assert_within_budget(actual, usual, exactly, floor=4.0 if n and dtype is torch.float32 else 0.0)


def outcomes(
    case: LinearCase, dtype: torch.dtype, config: str, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Result and gradients of one draw of the operands: by the kernels, by eager, in float64."""
    given = case.draw(dtype, "cuda", seed)
    torch.manual_seed(seed)
    cotangent = torch.randn(case.batch, case.heads, case.rows, case.value_dim, device="cuda").to(dtype)
    expected, gradients = exact(case, given, cotangent)
    usual, usual_gradients = eager(case, given, cotangent)
    fresh = tuple(x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in given)
    out = linear_attention_forward(*fresh, str(case.spec(dtype, "bshd")), config, True)[0]
    found = torch.autograd.grad(out, leaves(fresh), cotangent)
    return (out, *found), (usual, *usual_gradients), (expected, *gradients)


@pytest.mark.parametrize("name", ["swin", "long-causal"])
def test_two_runs_agree_and_a_replay_does(name: str) -> None:
    case = LARGE[name]
    spec, given = str(case.spec(torch.bfloat16)), case.draw(torch.bfloat16, "cuda")
    config = str(
        candidates(case.spec(torch.bfloat16), (None, None), (case.head_dim,) * 2, torch.bfloat16, case.optional)[0]
    )
    runs = [linear_attention_forward(*given, spec, config, False)[0] for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize(
    ("kind", "chosen"), [(Written, SimplifiedLinearAttention(kernel=3)), (Causal, LinearAttention())]
)
def test_compiled_training_follows_eager(kind: type, chosen: fxopt.Pass) -> None:
    batches = [x.cuda() for x in inputs(6, batch=64)]
    model = mixer(kind).cuda()
    for layer in model.layers:
        layer.drop = torch.nn.Identity()  # dropout would draw otherwise in either
    torch.manual_seed(3)
    student = fxopt.prepare(model, (batches[0],), passes=[chosen]).train()
    twin = fxopt.prepare(model, (batches[0],), passes=[chosen]).train()
    twin.load_state_dict(student.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="fxopt", options={"lower": "triton"})
    losses = train(student, optimizer_of(student), batches)
    assert train(compiled, optimizer_of(twin), batches) == pytest.approx(losses, rel=1e-4)


def test_a_converted_student_runs_its_kernels() -> None:
    (x,) = (x.cuda() for x in inputs(1, batch=64))
    student = fxopt.prepare(mixer().cuda(), (x,), passes=[SimplifiedLinearAttention()])
    fast = fxopt.convert(student)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="fxopt", options={"lower": "triton"})

    def evaluated(model: object) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(x)  # type: ignore[operator]
            return out

    torch.testing.assert_close(evaluated(compiled), evaluated(student.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["BertModel", "LlamaModel"])
def test_schedules_train_models_in_bfloat16(name: str, padded: bool) -> None:
    kind = getattr(transformers, name)
    config = kind.config_class(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    torch.manual_seed(0)
    model = kind(config).cuda().to(torch.bfloat16)
    ids = torch.randint(50, (4, 24), device="cuda")
    kept = (torch.arange(24, device="cuda") < torch.tensor([[24], [17], [9], [24]], device="cuda")).long()
    given = {"input_ids": ids, **({"attention_mask": kept} if padded else {})}
    student = fxopt.prepare(model.eval(), (), given, passes=[LinearAttention(steps=2)]).train()
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="fxopt")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for forward in (student, compiled, student, compiled):
        loss = forward(**given).last_hidden_state.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in student.parameters())
