"""The dump: the program before and after every pass as runnable files, diffs, kernels, the report and a manifest."""

from __future__ import annotations

import difflib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from fxopt.ir.program import Program
from fxopt.report.constants import Constants
from fxopt.report.folder import write_folder
from fxopt.report.listing import write_listing
from fxopt.report.names import file_name
from fxopt.report.report import Report
from fxopt.rewriter.pipeline import PassRecord, PipelineResult

_CAPTURED: Final = "00-captured.py"


def dump(
    before: Program,
    result: PipelineResult,
    steps: Sequence[tuple[str, Program]],
    directory: str | Path,
    kernels: Mapping[str, str],
    report: Report,
) -> Path:
    """Write everything that happened to ``before`` into ``directory`` and return it.

    Written are ``00-captured.py``; for each pass that changed the program ``<number>-<pass>.py``, which runs on its
    own, and ``<number>-<pass>.diff``; ``kernels/<name>.py``; ``report.txt`` and ``report.json``; ``constants/`` with
    the raw bytes of long constants; last ``manifest.json`` with versions, device, passes and every file's digest.

    Args:
        before: the program as captured.
        result: what the pipeline did with it.
        steps: the program after each pass, by the pass's name, in order (an observer of the pipeline collects them).
        directory: a new or empty directory, or one that holds an earlier dump; parents are made.
        kernels: generated source by name.
        report: the report to write beside them.

    Raises:
        DumpError: the directory holds other files, or edited ones, or can't be written.
    """
    constants = Constants()
    text = write_listing(before, "00-captured: the program as it was captured", constants)
    files = {_CAPTURED: text}
    written = _write_steps(text, steps, constants, files)
    for name, kernel in kernels.items():
        stem = file_name(name.removesuffix(".py"), (Path(f).stem for f in files if f.startswith("kernels/")))
        files[f"kernels/{stem}.py"] = kernel
    files |= {"report.txt": f"{report}\n", "report.json": f"{report.to_json()}\n"}
    facts = {
        "versions": _versions(),
        "device": _device(),
        "passes": _passes(result.records, written),
        "constants": constants.layout,
    }
    content = {name: text.encode() for name, text in files.items()}
    return write_folder(Path(directory), content | constants.files, facts)


def _write_steps(
    text: str, steps: Sequence[tuple[str, Program]], constants: Constants, files: dict[str, str]
) -> dict[str, list[str]]:
    """Add a listing and a diff for each step that changed something; return the stems by name of the pass."""
    written: dict[str, list[str]] = {}
    previous, body = _CAPTURED, _body(text)
    for name, program in steps:
        stem = file_name(f"{len(files) // 2 + 1:02}-{name}")
        listing = write_listing(program, f"{stem}: the program after this pass", constants)
        if _body(listing) == body:
            continue
        lines = difflib.unified_diff(
            files[previous].splitlines(keepends=True), listing.splitlines(keepends=True), previous, f"{stem}.py"
        )
        files |= {f"{stem}.py": listing, f"{stem}.diff": "".join(lines)}
        previous, body = f"{stem}.py", _body(listing)
        written.setdefault(name, []).append(stem)
    return written


def _body(listing: str) -> str:
    """A listing without its title, the only line that always differs."""
    return listing.partition("\n")[2]


def _passes(records: Sequence[PassRecord], written: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    remaining = {name: list(stems) for name, stems in written.items()}
    entries = []
    for record in records:
        stems = remaining.get(record.name)
        stem = stems.pop(0) if stems and record.result.modified else None
        entry = {"name": record.name, "tier": record.tier, "rewrites": len(record.result.replacements)}
        entry |= {"changed": record.result.modified, "seconds": record.seconds, "failure": record.failure}
        entry |= {"file": f"{stem}.py", "diff": f"{stem}.diff"} if stem else {}
        entries.append(entry)
    return entries


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return versions | {name: _version(name) for name in ("fxopt", "triton")}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()})"
