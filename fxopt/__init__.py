"""fxopt: a compiler made of graph rewrites for transformer models in PyTorch.

    model = fxopt.optimize(model)                          # or @fxopt.optimize on a class or a function
    model = torch.compile(model, backend="fxopt")          # the same through torch.compile
    print(fxopt.explain(model, *args))                     # what was, or would be, done
    student = fxopt.prepare(model, args, passes=[fxopt.passes.RepBatchNorm(steps=20_000)])    # train it as usual, then
    fast = fxopt.convert(student, batches)                 # fold what was trained, then the exact passes
    program = fxopt.capture(model, args); program.dump("out/")

Names load on first use, so that importing fxopt costs next to nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fxopt import passes
    from fxopt.api import (
        Program,
        RewrittenModule,
        capture,
        explain,
        explain_program,
        optimize,
        register_pass,
        rewrite,
    )
    from fxopt.conversion import convert
    from fxopt.errors import FxoptError, FxoptWarning
    from fxopt.ir.site import Site
    from fxopt.report.report import Report
    from fxopt.rewriter.builder import Builder
    from fxopt.rewriter.passes import Pass, PassResult, apply_rules
    from fxopt.rewriter.rule import Rejection, Rule
    from fxopt.training import advance, prepare, prepared

__version__: Final = "0.1.0"

# In a checkout passes/ and codegen/ stand beside this folder; installing puts them into it. Python that is started in a
# checkout finds this folder first, whatever is installed.
if not os.path.isdir(os.path.join(__path__[0], "passes")):
    __path__.append(os.path.dirname(__path__[0]))

_HOME: Final[dict[str, str]] = {
    "Program": "fxopt.api",
    "RewrittenModule": "fxopt.api",
    "capture": "fxopt.api",
    "explain": "fxopt.api",
    "explain_program": "fxopt.api",
    "optimize": "fxopt.api",
    "rewrite": "fxopt.api",
    "FxoptError": "fxopt.errors",
    "FxoptWarning": "fxopt.errors",
    "Site": "fxopt.ir.site",
    "Report": "fxopt.report.report",
    "Builder": "fxopt.rewriter.builder",
    "Pass": "fxopt.rewriter.passes",
    "PassResult": "fxopt.rewriter.passes",
    "apply_rules": "fxopt.rewriter.passes",
    "register_pass": "fxopt.api",  # which knows the passes of fxopt: their names are taken
    "Rejection": "fxopt.rewriter.rule",
    "Rule": "fxopt.rewriter.rule",
    "convert": "fxopt.conversion",
    "advance": "fxopt.training",
    "prepare": "fxopt.training",
    "prepared": "fxopt.training",
}

__all__ = [
    "Builder", "FxoptError", "FxoptWarning", "Pass", "PassResult", "Program", "Rejection", "Report",
    "RewrittenModule", "Rule", "Site", "advance", "apply_rules", "capture", "convert", "explain", "explain_program",
    "optimize", "passes", "prepare", "prepared", "register_pass", "rewrite",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "passes":
        return import_module("fxopt.passes")
    if name not in _HOME:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
