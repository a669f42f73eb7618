"""What stays of a class, or of an instance, that was optimized: everything but how calls run."""

from __future__ import annotations

import abc
import copy
import dataclasses
import inspect
import io
import pickle
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fxopt
from fxopt import backend
from fxopt.errors import OptionError, UnknownPassError

T = TypeVar("T")
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Plain(nn.Module):
    """Attention with packed projections."""

    scale: float = 0.25

    def __init__(self, width: int = 8, *, extra: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.extra = extra

    @property
    def width(self) -> int:
        return self.qkv.in_features

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """Mix the tokens."""
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed: Tensor = (q @ k.mT * self.scale).softmax(-1) @ v * factor
        return mixed


Fast = fxopt.optimize(Plain, base="eager")


@fxopt.optimize(base="eager")
class Decorated(Plain):
    """Decorated in place: the name is that of the optimized class."""


class Below(Decorated):
    def __init__(self) -> None:
        super().__init__(extra=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        result: Tensor = self.last(super().forward(x, factor))
        return result


def graphs(call: Callable[[], Any]) -> int:
    """How many graphs fxopt compiles in ``call``."""
    torch._dynamo.reset()
    with backend.collecting() as (outcomes, failures):
        call()
    assert not failures
    return len(outcomes)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
}
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "class": Fast,
    "decorated": Decorated,
    "subclass": Below,
    "instance": lambda: fxopt.optimize(Plain(), base="eager"),
    "instance of an optimized class": lambda: fxopt.optimize(Decorated(), base="aot_eager"),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("copier", COPIES)
def test_copies_are_compiled_too(maker: str, copier: str) -> None:
    model = MAKERS[maker]()
    other = COPIES[copier](model)
    assert type(other) is type(model)
    assert graphs(lambda: other(X)) == 1
    torch.testing.assert_close(other(X), model(X))
    assert other.state_dict().keys() == model.state_dict().keys()


def test_the_class_stays_what_it_was() -> None:
    assert (Fast.__name__, Fast.__qualname__, Fast.__module__, Fast.__doc__) == (
        "Plain", "Plain", __name__, Plain.__doc__,
    )  # fmt: skip
    assert inspect.signature(Fast) == inspect.signature(Plain)
    assert inspect.signature(Fast.forward) == inspect.signature(Plain.forward)
    assert typing.get_type_hints(Fast.__init__) == typing.get_type_hints(Plain.__init__)
    assert Fast.forward.__doc__ == "Mix the tokens."
    model = Fast(8, extra=True)
    assert isinstance(model, Plain) and model.extra and model.width == 8 and Fast.scale == 0.25
    assert graphs(lambda: Plain()(X)) == 0, "the class that was given is not changed"
    assert fxopt.optimize(Plain, base="eager") is Fast


def test_the_instance_keeps_names_class_and_signature() -> None:
    model = Plain(extra=True).eval()
    fast: Any = fxopt.optimize(model, base="eager")
    assert isinstance(fast, Plain) and fast is not model
    assert list(fast.state_dict()) == list(model.state_dict()) == ["qkv.weight", "qkv.bias"]
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert repr(fast) == repr(model) and fast.extra and not fast.training
    fast.load_state_dict(Plain().state_dict())
    assert graphs(lambda: fast(X)) == 1
    assert graphs(lambda: model(X)) == 0


def test_both_instances_share_one_state() -> None:
    model = Plain()
    fast: Any = fxopt.optimize(model, base="eager")
    model.eval()
    assert not fast.training
    fast.double()
    assert model(X.double()).dtype == torch.float64
    fast.float()
    model.qkv = nn.Linear(8, 24)
    model.scale = 3.0
    torch.testing.assert_close(fast(X), model(X))
    assert next(iter(fast.parameters())) is model.qkv.weight


class Skipped(nn.Sequential):
    """Without a forward of its own: TorchDynamo does not enter that of nn.Sequential from outside."""


@pytest.mark.parametrize("make", [Skipped, nn.Sequential])
def test_forwards_of_torch_itself_are_compiled(make: type[nn.Sequential]) -> None:
    model = make(nn.Linear(8, 8), Plain())
    assert graphs(lambda: fxopt.optimize(model, base="eager")(X)) == 1
    assert graphs(lambda: fxopt.optimize(make, base="eager")(nn.Linear(8, 8), Plain())(X)) == 1
    assert fxopt.explain(model, X).count("attention") == 1


def test_layers_of_one_class_share_what_was_compiled() -> None:
    layers = [fxopt.optimize(Plain(), base="eager") for _ in range(12)]
    assert len({type(layer) for layer in layers}) == 1
    assert graphs(lambda: [layer(X) for layer in layers]) == 1


def test_explain_of_an_optimized_model_compiles_nothing_else() -> None:
    for model in (Decorated(), fxopt.optimize(Plain())):
        assert fxopt.explain(model, X).count("attention") == 1
    in_place = Plain()
    in_place.compile(backend=lambda module, inputs: pytest.fail("its own compilation ran"))
    assert fxopt.explain(in_place, X).count("attention") == 1


def test_optimized_models_can_be_captured_and_rewritten() -> None:
    for model in (Decorated().eval(), fxopt.optimize(Plain().eval(), base="eager")):
        rewritten = fxopt.rewrite(model, (X,))
        assert list(rewritten.state_dict()) == ["qkv.weight", "qkv.bias"]
        torch.testing.assert_close(rewritten(X), model(X))
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


def test_arguments_of_any_name_and_state_that_calls_change() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, model: Tensor, module: Tensor) -> Tensor:
            self.get_buffer("calls").add_(1)
            return model.add_(module)

    assert not fxopt.explain(Counts(), model=X.clone(), module=X).sites
    rewritten = fxopt.rewrite(Counts(), (), {"model": X.clone(), "module": X})
    for counts in (fxopt.optimize(Counts(), base="eager"), rewritten):
        x = X.clone()
        for _ in range(2):
            counts(module=X, model=x)
        assert int(counts.get_buffer("calls")) == 2
        torch.testing.assert_close(x, 3 * X)


@torch.no_grad()
def test_inside_of_another_compiled_model() -> None:
    model = nn.Sequential(Fast(), fxopt.optimize(Plain(), base="eager"))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))
    assert list(model.state_dict()) == ["0.qkv.weight", "0.qkv.bias", "1.qkv.weight", "1.qkv.bias"]


class Registered(nn.Module):
    known: typing.ClassVar[list[str]] = []
    shift = 1

    def __init_subclass__(cls, *, tag: str, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        Registered.known.append(tag)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@fxopt.optimize(base="eager")
class Tagged(Registered, tag="a"):
    pass


class Further(Tagged, tag="b"):
    pass


@fxopt.optimize(base="eager")
class Of(nn.Module, Generic[T]):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@fxopt.optimize(base="eager")
@dataclasses.dataclass(eq=False)
class Data(nn.Module):
    shift: int = 1

    def __post_init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Slotted(nn.Module):
    __slots__ = ("shift",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "shift", 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + int(object.__getattribute__(self, "shift"))


@fxopt.optimize(base="eager")
class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def shift(self) -> int: ...

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift()


class Concrete(Abstract):
    def shift(self) -> int:
        return 1


def test_classes_of_every_kind() -> None:
    for model in (Tagged(), Further(), Concrete(), Of[int](), Data(1), fxopt.optimize(Slotted())):
        assert torch.equal(model(X), X + 1)
    assert Registered.known == ["a", "b"], "the optimized class is no further one"
    with pytest.raises(TypeError, match="abstract"):
        Abstract()  # type: ignore[abstract]


def test_what_can_not_be_optimized_says_so() -> None:
    class NoModule:
        def __call__(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(OptionError, match="a class of modules or a function"):
        fxopt.optimize(NoModule)
    with pytest.raises(OptionError, match="call it once"):
        fxopt.optimize(nn.LazyLinear(3))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="TorchScript"):
        fxopt.optimize(scripted)
    with pytest.raises(OptionError, match=r"compiled by fxopt\.optimize already"):
        Fast().compile()
    with pytest.raises(OptionError, match="inductor, dynamic, fullgraph"):
        fxopt.optimize(Plain, mode="reduce-overhead")
    with pytest.raises(OptionError, match=r"dynamic='yes'.*None or True or False"):
        fxopt.optimize(dynamic="yes")
    with pytest.raises(UnknownPassError, match=r"no pass called 'xyz'\. The passes are"):
        fxopt.optimize(Plain(), passes=["xyz"])


def test_a_checkout_works_where_an_installed_copy_is_elsewhere() -> None:
    root = Path(__file__).parent.parent
    code = "import fxopt; print(fxopt.__file__, fxopt.passes.__file__); import fxopt.codegen.attention"
    paths = [path for path in sys.path if path.endswith("site-packages")]
    done = subprocess.run(
        # -S: no editable install, which would find passes/ and codegen/ by itself.
        [sys.executable, "-S", "-c", f"import sys; sys.path += {paths!r}; {code}"],
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [str(root / "fxopt" / "__init__.py"), str(root / "passes" / "__init__.py")], (
        done.stderr
    )


def test_what_compiles_around_it_takes_the_module_itself() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    compiled = torch.compile(fxopt.optimize(model, base="eager"), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_parametrized_before_and_not_after() -> None:
    before, after, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)
    torch.nn.utils.parametrizations.weight_norm(before)
    torch.testing.assert_close(fxopt.optimize(before, base="eager")(x), before(x))
    optimized = fxopt.optimize(after, base="eager")
    torch.nn.utils.parametrizations.weight_norm(after)
    with pytest.raises(OptionError, match="parametrize the model, then optimize it"):
        optimized(x)
