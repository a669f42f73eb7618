"""Passes from elsewhere: what can be registered, entry points of other packages, and what a broken one costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.errors import OptionError, PassError
from fxopt.ir.program import Program
from fxopt.passes import NoOps
from fxopt.rewriter import registry
from fxopt.rewriter.passes import PassResult
from fxopt.rewriter.pipeline import run_pipeline

ELSEWHERE = """
import fxopt


@fxopt.register_pass
class Nothing:
    \"\"\"``x -> x``, from another package.\"\"\"

    name, tier, requires = "nothing-from-elsewhere", "exact", ()

    def run(self, program):
        return fxopt.PassResult(False)
"""
ENTRY_POINTS = """
[fxopt.passes]
absent = elsewhere_absent:Pass
broken = elsewhere:Missing
nothing-from-elsewhere = elsewhere:Nothing
"""


@pytest.fixture(autouse=True)
def same_passes_afterwards() -> Iterator[None]:
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


class Base:
    """``x -> x``."""

    name: Any = "base-of-a-test"
    tier: Any = "exact"
    requires: Any = ()

    def run(self, program: Program) -> Any:
        return PassResult(False)


def relu(x: Tensor) -> Tensor:
    return x.relu() + 1


def test_what_is_no_pass_is_refused() -> None:
    wrongs: tuple[tuple[Any, str], ...] = (
        (type("NoRun", (), {"name": "a", "tier": "exact"}), "NoRun is not a pass: it lacks requires, run"),
        (type("NoTier", (Base,), {"tier": "sure"}), "no tier 'sure'; choose one of exact, approximate, trainable"),
        (type("Taken", (Base,), {"name": "fuse-attention"}), "'fuse-attention' belongs to fxopt.passes.attention"),
        (Base(), "give the class of a pass"),
    )
    for wrong, message in wrongs:
        with pytest.raises(OptionError, match=message):
            fxopt.register_pass(wrong)


def test_names_of_fxopt_are_taken_from_the_start() -> None:
    code = (
        "import fxopt\n"
        "class Mine:\n    name, tier, requires, run = 'fuse-attention', 'exact', (), None\n"
        "try: fxopt.register_pass(Mine)\n"
        "except fxopt.FxoptError as error: print(error)\n"
        "print(fxopt.passes.FuseAttention.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "belongs to fxopt.passes" in done.stdout and done.stdout.endswith("fuse-attention\n")


def test_entry_points_of_other_packages(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    metadata = tmp_path / "elsewhere-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fxopt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "passes"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing-from-elsewhere" in done.stdout and "fuse-attention" in done.stdout
    assert (
        "the pass 'absent' of elsewhere is not known: its entry point elsewhere_absent:Pass gives Module" in done.stderr
    )
    assert "the pass 'broken' of elsewhere is not known" in done.stderr


class GivesNothing(Base):
    def run(self, program: Program) -> Any:
        return None


class SaysNothing(Base):
    def run(self, program: Program) -> Any:
        (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
        node.target = torch.ops.aten.neg.default
        return PassResult(False)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (GivesNothing(), r"run\(\) gave None; it must give a PassResult"),
        (SaysNothing(), r"run\(\) changed the program and gave PassResult\(modified=False\)"),
    ],
)
def test_a_pass_that_breaks_its_contract_is_rolled_back(broken: Any, message: str) -> None:
    program, x = fxopt.capture(relu, (torch.randn(3),)), torch.randn(3)
    result = run_pipeline(program, [NoOps(), broken, NoOps()])
    assert [bool(record.failure) for record in result.records] == [False, True, False]
    assert torch.equal(result.program.module(x)[0], relu(x))
    with pytest.raises(PassError, match=f"pass base-of-a-test failed: {message}"):
        run_pipeline(program, [broken], strict=True)
