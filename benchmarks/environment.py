"""What a figure was measured on: the machine and the versions, as data that goes into every result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

import torch

_DISTRIBUTIONS = ("fxopt", "triton", "transformers", "timm")
_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def environment(device: torch.device | str) -> dict[str, str]:
    """Machine and versions behind a figure measured on ``device``.

    Keys: ``python``, ``torch``, ``cuda`` and ``cudnn`` (those torch uses), ``fxopt``, ``triton``, ``transformers``
    and ``timm`` ("absent" where not installed), ``device``; for a CUDA device also its capability, multiprocessors
    and what the driver reports now (driver version, clocks as found, temperature, power).
    """
    device = torch.device(device)
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    facts |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    facts |= {name: _version(name) for name in _DISTRIBUTIONS}
    if device.type != "cuda":
        return facts | {"device": f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"}
    properties = torch.cuda.get_device_properties(device)
    facts["device"] = properties.name
    facts["capability"] = f"{properties.major}.{properties.minor}"
    facts["multiprocessors"] = str(properties.multi_processor_count)
    return facts | _driver_facts(str(properties.uuid))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _driver_facts(uuid: str) -> dict[str, str]:
    """Read-only query of the driver; one "driver" entry that says why where it cannot be asked."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver": f"unknown: {error}"}
    return dict(zip(_SMI_FIELDS, (field.strip() for field in answer.stdout.strip().split(",")), strict=False))
