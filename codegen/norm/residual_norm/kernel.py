"""The generated kernels of a residual norm: where they can serve, and their source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fxopt.codegen.norm.residual_norm.backward import BackwardText
from fxopt.codegen.norm.residual_norm.config import LONGEST_BACKWARD, read_config
from fxopt.codegen.norm.residual_norm.forward import ForwardText
from fxopt.codegen.norm.residual_norm.problem import Problem, objection
from fxopt.errors import LoweringError

#: The kind under which their sources are kept in the cache.
KIND: Final = "residual_norm_triton"


def backward_objection(problem: Problem) -> str | None:
    """Why no backward can be generated, as a sentence, or ``None`` when one can."""
    reason = objection(problem)
    if reason is None and problem.width > LONGEST_BACKWARD:
        return f"the backward holds rows in registers, of at most {LONGEST_BACKWARD} elements"
    return reason


def source(problem: Problem, config: str) -> str:
    """The source of a module that defines ``launch(x, residual, weight, bias, with_sum, with_statistics)``, which
    returns norm, sum, mean and inverse deviation, and runs alone. The same arguments always give the same text.

    Raises:
        LoweringError: no kernel can be generated; `objection` says why.
    """
    _check(objection(problem))
    return str(ForwardText(problem, read_config(config)))


def backward_source(problem: Problem, config: str, wanted: Sequence[str]) -> str:
    """The source of a module that defines ``launch(dnormal, dsum, total, mean, scale, weight)``, which returns the
    gradient of the sum and those of weight and bias as far as they are ``wanted``.

    Raises:
        LoweringError: no kernel can be generated; `backward_objection` says why.
    """
    _check(backward_objection(problem))
    return str(BackwardText(problem, read_config(config), tuple(wanted)))


def _check(reason: str | None) -> None:
    if reason is not None:
        raise LoweringError(f"no Triton kernel for this residual norm: {reason}; lower it to ATen instead")
