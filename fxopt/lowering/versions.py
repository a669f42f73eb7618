"""What a cached decision or kernel depends on besides the site itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

#: The packages of fxopt, which an editable installation has in several folders.
_PACKAGES: Final = ("fxopt", "fxopt.codegen", "fxopt.passes")


@cache
def fingerprint(device: torch.device) -> str:
    """Device name and the versions of fxopt, torch, triton and cuDNN, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} x{torch.get_num_threads()}"
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    packages = [f"{package} {_version(package)}" for package in ("fxopt", "triton")]
    return ", ".join([name, f"torch {torch.__version__}", *packages, f"cudnn {cudnn}"])


@cache
def source_digest() -> str:
    """The version of fxopt and the SHA-256 of its Python files, which change without it where fxopt is developed."""
    digest = hashlib.sha256()
    for name, path in _sources():
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return f"{_version('fxopt')} {digest.hexdigest()}"


def _sources() -> Iterator[tuple[str, Path]]:
    """The Python files of fxopt, named by package and the path inside of it."""
    for package in _PACKAGES:
        spec = find_spec(package)
        # Only the first place is the package's own: fxopt has a second one where the others lie beside it.
        for folder in ((spec.submodule_search_locations if spec else None) or ())[:1]:
            yield from ((f"{package}{path.removeprefix(folder)}", Path(path)) for path in _python_files(folder))


def _python_files(folder: str) -> list[str]:
    return sorted(
        os.path.join(inner, name) for inner, _, names in os.walk(folder) for name in names if name.endswith(".py")
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
