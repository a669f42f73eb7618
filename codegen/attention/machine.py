"""What kernels need of the machine, and objections that are about it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

_HOPPER: Final = (9, 0)


class Shortfall(str):
    """An objection to the machine or to how it is set up: elsewhere the kernel would serve this very problem.

    Reports say these of every site. An objection to the problem is a plain text: that a kernel for few keys doesn't
    serve many is no news. So a kernel objects to the problem first, and to the machine last.
    """

    __slots__ = ()


def hopper_objection(capability: tuple[int, int]) -> Shortfall | None:
    """Why no Gluon kernel for Hopper can run on a device of this ``capability``, or ``None`` when it can."""
    if capability != _HOPPER:
        return Shortfall(f"it needs compute capability 9.0, not {capability[0]}.{capability[1]}")
    return None if _has_gluon() else Shortfall("this Triton has no Gluon")


def _has_gluon() -> bool:
    try:
        return find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:  # of triton.experimental, which stands around it
        return False
