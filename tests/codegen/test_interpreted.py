"""Runs ``tests/codegen/interpreted`` in a process where Triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[2]


FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
PROCESSES = min(8, len(FILES))


@pytest.mark.parametrize("first", range(PROCESSES))
def test_kernels_in_the_interpreter(first: int) -> None:
    """Several files in each process: to start one takes as long as some files do."""
    files = FILES[first::PROCESSES]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *(str(FOLDER / file) for file in files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    for file in files:
        assert len(re.findall(rf"/{file}::.* PASSED", run.stdout)) > 10, file
