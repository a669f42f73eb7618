"""The generated kernel of a narrow feed-forward block: its source."""

from __future__ import annotations

from typing import Final

from fxopt.codegen.mlp.narrow_mlp.config import read_config
from fxopt.codegen.mlp.narrow_mlp.problem import Problem, objection
from fxopt.codegen.mlp.narrow_mlp.source import Text
from fxopt.errors import LoweringError

#: The kind under which its sources are kept in the cache.
KIND: Final = "narrow_mlp_triton"


def source(problem: Problem, config: str) -> str:
    """The source of a module that defines ``launch(x, up, up_bias, down, down_bias, residual)``, which returns the
    result, and runs alone. The same arguments always give the same text.

    Raises:
        LoweringError: no kernel can be generated, or not of this configuration.
    """
    chosen = read_config(config)
    reason = objection(problem)
    if reason is None and problem.hidden % chosen.chunk:
        reason = f"the hidden width {problem.hidden} is no multiple of {chosen.chunk}"
    if reason is not None:
        raise LoweringError(f"no Triton kernel for this feed-forward block: {reason}; lower it to ATen instead")
    return str(Text(problem, chosen))
