"""Pytest fixtures for testing passes, rules and kernels: load with ``-p fxopt.testing.plugin``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEFAULT_SEED = 2024


@pytest.fixture
def fxopt_seed() -> Iterator[int]:
    """Seed torch's and Python's generators for one test, and put their states back after it."""
    state = random.getstate()
    with torch.random.fork_rng():
        random.seed(DEFAULT_SEED)
        torch.manual_seed(DEFAULT_SEED)
        yield DEFAULT_SEED
    random.setstate(state)


@pytest.fixture
def fxopt_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """fxopt's cache directory for one test alone: nothing is read from, or written to, the user's."""
    home = tmp_path / "cache"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(home))
    return home
