"""Masks of captured vectors that keep one run of keys, as padding and documents do: comparisons instead of reads.

The hull of a tile (`fxopt.codegen.attention.portable.hull`) says which keys its rows can possibly keep, and which of
these all of them keep. Where both are the same run, that is the mask: a key is kept if it lies inside, and nothing need
be read for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Final

from fxopt.codegen.attention.captured import CapturedTensor

#: What a block update is told: the first key of the run, negative where a tile keeps others, and one past the last.
NAMES: Final = ("run_start", "run_stop")
#: The lines that find out, after those of the hull.
LIMITS: Final = """
run_start, run_stop = -1, Sk
if HULL:
    scattered = (tl.load(hull) != tl.load(hull + 2)) | (tl.load(hull + 1) != tl.load(hull + 3))
    run_start = tl.where(scattered, -1, tl.load(hull))
    run_stop = tl.where(scattered, Sk, tl.load(hull + 1))"""


def masks(above: str, below: str, rest: str, read: Iterable[CapturedTensor]) -> str:
    """The lines that mask a block: by limits ``above`` and ``below`` of rows, if any, by the run, or by ``rest``."""
    stop = f"tl.minimum({above}, run_stop)" if above else "run_stop"
    start = f"tl.maximum({below}, run_start)" if below else "run_start"
    loads = "\n".join(c.load_in_loop for c in read if c.in_loop).replace("BOUNDED and not EVEN", "BOUNDED")
    lines = [
        "if BOUNDED:",
        f"    kept = before(first, eights, {stop}, s, BLOCK_N)",
        f"    kept &= ~before(first, eights, {start}, s, BLOCK_N)",
        '    x = tl.where(kept, x, float("-inf"))',
        "    if run_start < 0:",
        *textwrap.indent(loads, " " * 8).splitlines(),
        f'        x = tl.where({rest}, x, float("-inf"))',
    ]
    return "\n".join(lines)
