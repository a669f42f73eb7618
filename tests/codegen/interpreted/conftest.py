"""These tests run generated kernels in Triton's interpreter, which has to be chosen before Triton is imported.

``tests/codegen/test_interpreted.py`` runs them in a process of their own; elsewhere they are not collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob: list[str] = []

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.codegen.interpreted import device  # noqa: F401 - puts the interpreter right
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """``torch.empty`` gives NaN, or the largest integer, so that what is not written or left shows; a fixed seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
