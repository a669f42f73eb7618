"""Graphs with operators of fxopt in Inductor's caches: found by the next process, and never for another graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxopt import passes
from fxopt.cache import VARIABLE
from fxopt.codegen.attention import operator
from fxopt.lowering.first_pass import FirstPass
from fxopt.lowering.versions import source_digest
from tests.lowering.cached import CASES

Found = dict[str, dict[str, str]]
#: What the first process compiles; the second one everything.
_FIRST: Final = ("plain", "training", "constant")


def in_process(caches: Path, *names: str) -> Found:
    folders = {VARIABLE: "fxopt", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environment = {**os.environ, **{name: str(caches / folder) for name, folder in folders.items()}}
    environment["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "1"
    command = [sys.executable, "-m", "tests.lowering.cached", *names]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    caches = tmp_path_factory.mktemp("caches")
    return in_process(caches, *_FIRST), in_process(caches, *CASES)


@pytest.mark.parametrize("name", _FIRST)
def test_the_next_process_finds_what_one_compiled(processes: tuple[Found, Found], name: str) -> None:
    graphs = 2 if name == "training" else 1  # forward and backward
    first, second = processes
    assert first[name] == {"graphs": f"{graphs} miss", "autograd": "1 miss"}
    assert second[name] == {"graphs": f"{graphs} hit", "autograd": "1 hit"}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("other")] + ["Inductor alone"])
def test_nothing_is_found_for_what_is_not_the_same(processes: tuple[Found, Found], name: str) -> None:
    """The process compares all results with eager's."""
    expected = "1 bypass" if name == "other pass" else "1 miss"
    assert processes[1][name] == {"graphs": expected, "autograd": expected}


def test_constants_are_operands_of_compiled_code(processes: tuple[Found, Found]) -> None:
    """So the code is the same for others, and must not contain their numbers: the process compares results."""
    assert processes[1]["constant of other numbers"] == {"graphs": "1 hit", "autograd": "1 hit"}


class Named(CustomGraphPass):
    """A pass of a user's."""

    def __init__(self, name: Any) -> None:
        self.name, self.calls = name, 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> Any:
        return self.name


def _nothing() -> None:
    pass


def test_the_key_names_the_source_and_the_passes_of_the_user() -> None:
    assert FirstPass(_nothing, None).uuid() == ("fxopt", source_digest())
    assert FirstPass(_nothing, Named("mine")).uuid() == ("fxopt", source_digest(), "mine")
    assert FirstPass(_nothing, [Named("mine"), Named("other")]).uuid() == ("fxopt", source_digest(), "mine", "other")


@pytest.mark.parametrize("given", [Named(None), [Named("mine"), Named(None)], lambda graph: None])
def test_nothing_is_cached_with_a_pass_that_has_no_name(given: Any) -> None:
    assert FirstPass(_nothing, given).uuid() is None


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_pass_of_the_user_runs(everywhere: bool) -> None:
    """Whether it is set for the model or for all of them."""
    mine = Named("mine")
    settings: dict[str, Any] = {"joint_custom_pre_pass": mine}
    torch._dynamo.reset()
    with torch._inductor.config.patch(settings if everywhere else {}):
        options: dict[str, Any] = {"strict": True} if everywhere else {"strict": True, "inductor": settings}
        compiled = torch.compile(lambda x: x @ x, backend="fxopt", options=options)
        compiled(torch.ones(3, 3))
    assert mine.calls == 1


def test_the_digest_changes_with_any_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fxopt.lowering import versions

    path = tmp_path / "one.py"
    monkeypatch.setattr(versions, "_sources", lambda: iter([("one", path)]))
    digests = set()
    for text in ("x = 1", "x = 2"):
        path.write_text(text)
        digests.add(source_digest.__wrapped__())
    assert len(digests) == 2


def test_the_digest_reads_all_of_fxopt_and_nothing_else() -> None:
    from fxopt.lowering import versions

    found = dict(versions._sources())
    assert {Path(module.__file__ or "") for module in (versions, operator, passes)} <= set(found.values())
    assert all(str(path).endswith(name.removeprefix("fxopt.").removeprefix("fxopt")) for name, path in found.items())
    assert Path(__file__) not in found.values()
