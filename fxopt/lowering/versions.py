"""What a cached decision or kernel depends on besides the site itself."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch


@cache
def fingerprint(device: torch.device) -> str:
    """Device name and the versions of fxopt, torch, triton and cuDNN, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} x{torch.get_num_threads()}"
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    packages = [f"{package} {_version(package)}" for package in ("fxopt", "triton")]
    return ", ".join([name, f"torch {torch.__version__}", *packages, f"cudnn {cudnn}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
