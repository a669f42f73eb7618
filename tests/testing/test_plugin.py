from __future__ import annotations

import os
import random
from pathlib import Path

import platformdirs
import torch

from fxopt import cache

pytest_plugins = ["fxopt.testing.plugin"]


def test_seed_makes_draws_repeatable(fxopt_seed: int) -> None:
    torch_draw, python_draw = torch.rand(3), random.random()
    torch.manual_seed(fxopt_seed)
    random.seed(fxopt_seed)
    assert torch.equal(torch.rand(3), torch_draw)
    assert random.random() == python_draw


def test_cache_is_the_tests_own(fxopt_cache: Path) -> None:
    assert platformdirs.user_cache_path("fxopt").is_relative_to(fxopt_cache)
    assert os.stat(fxopt_cache).st_mode & 0o777 == 0o700


def test_cache_of_the_test_is_the_one_that_fxopt_uses(fxopt_cache: Path) -> None:
    assert cache.directory() == fxopt_cache
