"""What holds for every test: the same draws in every run, no GPU test without a GPU, a cache of the tests' own.

Draws depend on the test's name alone, not on what ran before it in the same process. `FXOPT_TEST_SEED` gives others, to
find tests that hold for some draws only.
"""

from __future__ import annotations

import gc
import os
import random
import zlib
from collections.abc import Iterator
from typing import Final

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fxopt", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fxopt")

_SEED: Final = os.environ.get("FXOPT_TEST_SEED", "0")
# Tests that look into a compilation need one, whatever ran before. Inductor reads this when it is imported.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
# Compilations and interpreted kernels make many objects that live shortly: collecting them took a seventh of the time.
gc.set_threshold(50_000, 20, 100)
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
# For its logs, Dynamo times the guards of each compilation, with the processor's caches emptied first: 30 ms and more.
vars(torch._C._dynamo.guards)["profile_guard_manager"] = lambda *_: 0.0
# Seeds of devices that aren't there are kept, each with a stack of its own: a millisecond a seed.
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        vars(_device)["manual_seed_all"] = lambda _: None


def _seed(name: str) -> None:
    seed = zlib.crc32(f"{_SEED} {name}".encode())
    random.seed(seed)
    torch.manual_seed(seed)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Models and tensors of a module's own are drawn when it is imported, which is when it is collected."""
    if isinstance(collector, pytest.Module):
        _seed(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed before any fixture of the test is set up."""
    _seed(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where torch sees none; what takes a minute comes first, so that no process waits."""
    items.sort(key=lambda item: "test_interpreted" not in item.nodeid)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage looks at it again (half a second each in a full run)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither a test nor a process it starts reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXOPT_CACHE_DIR", str(tmp_path_factory.mktemp("fxopt-cache")))
        yield
