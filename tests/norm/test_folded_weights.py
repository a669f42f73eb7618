"""Where folded weights live: names, renewal, gradients and modes of a rewritten module, compiled and exported."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fxopt
from fxopt.errors import OptionError
from fxopt.testing import assert_within_budget, evaluate, oracle
from tests.norm.support import Net, assert_exact, draw, randomise

C = 8
X = draw(3, 5, C)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _run(net: Any, x: Tensor) -> Any:
    y = net.norm(x)
    return torch.relu(net.a(y)) @ net.b(y).mT


def _net(seed: int = 0) -> Net:
    return Net(_run, seed, norm=nn.LayerNorm(C), a=nn.Linear(C, 6), b=nn.Linear(C, 6, bias=False)).double()


def _rewritten(net: nn.Module) -> fxopt.RewrittenModule:
    with torch.no_grad():
        return fxopt.rewrite(net, (X,), strict=True)


def _folds(module: fxopt.RewrittenModule) -> bool:
    return "aten.type_as" in module.program().operators()


def test_names_and_values_of_the_model_stay() -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    rewritten: Any = _rewritten(net)
    assert list(rewritten.state_dict()) == list(net.state_dict())
    assert [name for name, _ in rewritten.named_parameters()] == [name for name, _ in net.named_parameters()]
    for module in (net, rewritten):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    names = [name for name, _ in rewritten.named_buffers()]
    assert names == [f"folded_weights.{name}" for name in ("a_weight", "a_bias", "b_weight", "b_weight_1")]


@torch.no_grad()
def test_a_changed_weight_is_folded_anew() -> None:
    net = _net()
    rewritten: Any = _rewritten(net)
    kept = rewritten.folded_weights.a_weight
    for module in (net, rewritten):
        module.norm.weight[2] = 17.0
    assert_exact(rewritten, net, (X,))
    assert rewritten.folded_weights.a_weight is kept, "compiled code reads the same memory"
    for module in (net, rewritten):
        module.a.weight = nn.Parameter(torch.ones_like(module.a.weight))
    assert_exact(rewritten, net, (X,))
    for module in (net, rewritten):
        module.b.weight.data = torch.ones_like(module.b.weight)
    assert_exact(rewritten, net, (X,))


@torch.no_grad()
def test_unchanged_weights_are_not_folded_again() -> None:
    rewritten: Any = _rewritten(_net())
    division = rewritten._mode().division
    assert division is not None
    calls: list[int] = []
    hook = division.prologue.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        rewritten(X)
    rewritten.train().eval()(X)
    assert not calls
    rewritten.norm.bias.zero_()
    rewritten(X)
    rewritten(X)
    assert len(calls) == 1
    hook.remove()


@torch.no_grad()
def test_loading_a_state_dict() -> None:
    net, other = _net(), _net(seed=5)
    rewritten: Any = _rewritten(net)
    fast = torch.compile(rewritten, backend="aot_eager", fullgraph=True)
    assert_exact(fast, net, (X,))
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    rewritten.load_state_dict(torch.load(file))
    assert_exact(fast, other, (X,))
    net.load_state_dict(rewritten.state_dict())
    assert_exact(net, other, (X,))


@torch.no_grad()
def test_moving_to_another_dtype() -> None:
    net = _net().float()
    rewritten: Any = fxopt.rewrite(net, (X.float(),), passes=["fold-norm-affine"])
    assert_exact(rewritten.double(), net.double(), (X,))
    assert rewritten.folded_weights.a_weight.dtype == torch.float64


class WritesDtypes(nn.Module):
    """Its program casts to the dtypes that it was captured in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.norm(x))
        weights = torch.softmax(y @ y.mT, -1, dtype=torch.float32).to(y.dtype)
        result: Tensor = self.b(weights @ y) + torch.arange(C, dtype=x.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_program_is_that_of_the_precision_it_is_in(dtype: torch.dtype) -> None:
    net, x = randomise(WritesDtypes()).eval(), X.to(dtype)
    rewritten: Any = fxopt.rewrite(net, (X.float(),)).to(dtype)
    moved = copy.deepcopy(net).to(dtype)
    for training in (False, True, False):
        rewritten.train(training)
        with torch.set_grad_enabled(training):
            actual, eager = rewritten(x), moved(x)
        assert actual.dtype == dtype
        assert_within_budget(actual, eager, oracle(moved, x), floor=1.0)
    folds = bool(rewritten.folded_weights._buffers)
    assert folds == (dtype != torch.float16), "float16 may not hold products of weights"


def test_a_frozen_program_keeps_the_precision_that_is_written_into_it() -> None:
    rewritten = fxopt.rewrite(randomise(WritesDtypes()).eval(), (X.float(),)).freeze()
    with pytest.raises(OptionError, match=r"frozen in torch\.float32.* now in torch\.bfloat16"):
        rewritten.bfloat16()


def test_gradients_reach_the_weights_themselves() -> None:
    net = _net()
    rewritten: Any = _rewritten(net)
    assert not _folds(rewritten), "gradients are recorded here"
    with torch.no_grad():
        assert _folds(rewritten)
    expected, actual = evaluate(net, X), evaluate(rewritten, X)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_input_alone_run_the_folded_program() -> None:
    net = _net().requires_grad_(False)
    rewritten: Any = _rewritten(net)
    assert _folds(rewritten)
    x = X.clone().requires_grad_()
    (actual,) = torch.autograd.grad(rewritten(x).sum(), x)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# PyTorch scripts its rules for tangents when they are first needed.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`.* is deprecated")
def test_weights_in_functional_transforms_are_not_folded() -> None:
    """Tangents and models side by side belong to one call; what is kept for the next is made of the module's own."""
    net = Net(lambda n, x: torch.relu(n.a(x) * n.scale), a=nn.Linear(C, 6), scale=torch.ones(6)).double()
    rewritten = _rewritten(net.requires_grad_(False))
    assert _folds(rewritten)
    weights = {name: parameter * 1.5 for name, parameter in net.named_parameters()}
    stacked = {name: torch.stack((value, 2 * value)) for name, value in weights.items()}

    def run(module: nn.Module) -> list[Tensor]:
        def call(chosen: Any) -> Tensor:
            result: Tensor = torch.func.functional_call(module, chosen, (X,))
            return result

        with torch.no_grad(), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(value, value) for name, value in weights.items()}
            tangent = forward_ad.unpack_dual(call(duals)).tangent
        assert tangent is not None
        return [tangent, torch.func.vmap(call)(stacked), call(weights)]

    torch.testing.assert_close(run(rewritten), run(net), rtol=1e-12, atol=1e-12)
    assert_exact(rewritten, net, (X,))


def test_training_and_coming_back() -> None:
    net = _net()
    rewritten: Any = _rewritten(net)
    for module in (net, rewritten):
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(X).square().mean().backward()
        optimizer.step()
        module.eval()
    assert_exact(rewritten, net, (X,))
    with torch.no_grad():
        assert _folds(rewritten)


@pytest.mark.parametrize("base", ["aot_eager", "inductor"])
def test_compiled_with_and_without_gradients(base: str) -> None:
    net = _net()
    rewritten: Any = _rewritten(net)
    fast = torch.compile(rewritten, backend=base, fullgraph=True)
    assert_exact(fast, net, (X,))
    expected, actual = evaluate(net, X), evaluate(fast, X)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_compiled_code_sees_what_was_renewed() -> None:
    net = _net()
    rewritten: Any = _rewritten(net)
    fast: Any = torch.compile(rewritten, backend="aot_eager", fullgraph=True)
    fast(X)
    for module in (net, rewritten):
        module.norm.weight.mul_(2)
    rewritten.renew_folded_weights()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_exact(fast, net, (X,))


@torch.no_grad()
def test_the_backend_reports_a_folded_norm_as_it_is() -> None:
    rewritten: Any = _rewritten(_net())
    (site,) = fxopt.explain(rewritten, X).sites
    assert (site.kind, site.rule, site.reason) == (
        "norm", "", "it already is one operator and is left to the base compiler",
    )  # fmt: skip


@torch.no_grad()
# PyTorch 2.11 says it of what torch.export.load itself reads.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_export_and_back(tmp_path: Any) -> None:
    net = _net()
    exported = torch.export.export(_rewritten(net), (X,))
    targets = [spec.target for spec in exported.graph_signature.input_specs]
    assert "folded_weights.a_weight" in targets
    torch.export.save(exported, tmp_path / "net.pt2")
    assert_exact(torch.export.load(tmp_path / "net.pt2").module(), net, (X,))


def test_inference_mode() -> None:
    net = _net()
    with torch.inference_mode():
        rewritten: Any = fxopt.rewrite(net, (X,), strict=True)
        torch.testing.assert_close(rewritten(X), net(X), rtol=1e-12, atol=1e-12)
    randomise(net, 9)
    with torch.inference_mode():
        rewritten.load_state_dict(net.state_dict())
        torch.testing.assert_close(rewritten(X), net(X), rtol=1e-12, atol=1e-12)
    evaluate(rewritten, X)


@torch.no_grad()
def test_a_tensor_that_is_no_parameter_is_folded_and_watched() -> None:
    scale = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
    net = Net(lambda n, x: n.a(x * scale), a=nn.Linear(C, 4)).double()
    rewritten: Any = fxopt.rewrite(net, (X,), strict=True)
    assert [name for name, _ in rewritten.folded_weights.named_buffers()] == ["a_weight"]
    assert_exact(rewritten, net, (X,))
    scale.mul_(3)
    assert_exact(rewritten, net, (X,))


@torch.no_grad()
def test_a_weight_edited_by_the_model_is_no_weight() -> None:
    def run(net: Any, x: Tensor) -> Any:
        net.norm.weight.mul_(2)
        return net.a(net.norm(x))

    net = Net(run, norm=nn.LayerNorm(C), a=nn.Linear(C, 6)).double()
    rewritten: Any = fxopt.rewrite(net, (X,), passes=["fold-norm-affine"])
    assert not list(rewritten.folded_weights.buffers())


@torch.no_grad()
def test_a_dump_of_a_folded_program_runs(tmp_path: Any) -> None:
    net = _net()
    folder = fxopt.capture(net, (X,)).dump(tmp_path / "dump")
    last = sorted(folder.glob("[0-9]*fold-norm-affine*.py"))[-1].read_text()
    assert "torch.ops.aten.layer_norm.default(arg5_1, [8], None, None" in last


@torch.no_grad()
def test_frozen_modules_keep_folded_weights_only() -> None:
    net = _net()
    rewritten: Any = _rewritten(net)
    assert rewritten.freeze() is rewritten
    names = ["a_weight", "a_bias", "b_weight", "b_weight_1"]
    assert list(rewritten.state_dict()) == [f"folded_weights.{name}" for name in names]
    assert not list(rewritten.parameters())
    fast = torch.compile(rewritten, backend="aot_eager", fullgraph=True)
    for module in (rewritten, fast, torch.export.export(rewritten, (X,)).module()):
        assert_exact(module, net, (X,))
    assert "aten.type_as" not in rewritten.program().operators()


@torch.no_grad()
def test_state_of_a_frozen_module_goes_into_another() -> None:
    net, other = _net(), _rewritten(_net(seed=4)).freeze()
    other.load_state_dict(_rewritten(net).freeze().state_dict())
    assert_exact(other, net, (X,))
    single = X.float()
    torch.testing.assert_close(other.float()(single), net.float()(single), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_freezing_keeps_what_is_read_elsewhere() -> None:
    def tied(net: Any, ids: Tensor) -> Any:
        return torch.nn.functional.linear(net.norm(net.table(ids)), net.table.weight)

    net, ids = Net(tied, table=nn.Embedding(11, C), norm=nn.LayerNorm(C)).double(), torch.arange(6).view(2, 3)
    rewritten: Any = fxopt.rewrite(net, (ids,)).freeze()
    assert set(rewritten.state_dict()) == {
        "table.weight", "folded_weights.table_weight", "folded_weights.table_weight_1",
    }  # fmt: skip
    assert_exact(rewritten, net, (ids,))


def test_freezing_is_for_evaluation_and_for_good() -> None:
    rewritten: Any = fxopt.rewrite(_net().train(), (X,))
    with pytest.raises(fxopt.errors.OptionError, match="call eval"):
        rewritten.freeze()
    rewritten.eval().freeze()
    with pytest.raises(fxopt.errors.OptionError, match="was frozen"):
        rewritten.train()
    assert rewritten.eval() is rewritten


@torch.no_grad()
def test_freezing_without_folds_changes_nothing() -> None:
    net = Net(lambda n, x: n.a(x), a=nn.Linear(C, 4)).double()
    rewritten: Any = fxopt.rewrite(net, (X,)).freeze()
    assert list(rewritten.state_dict()) == ["a.weight", "a.bias"]
    assert_exact(rewritten, net, (X,))
