"""The order in which groups of warps ask for their products, by a baton that goes round (named barriers).

Left to themselves, all groups of a program wait for the tensor cores and then, all at once, compute exponentials. With
a baton a group asks for its products when the group before it has passed it on, so that its exponentials run beside the
products of others. Barrier g is where group g waits for it: 128 threads wait, and 128 of the group before it arrive.

No schedule ends in a deadlock. All groups go through the loop equally often, since they have the same tiles, and the
same blocks of each; in each turn a group takes the baton once and passes it on once, under no condition. The last one
passes it once more before the loop, and the first takes it once more after it, so that as many arrive at every barrier
as wait there, in a loop of no turns too. There is one baton, so none arrives twice before the other has waited. With
the baton, a group waits for its own products and for what has been loaded. So a run where each turn of a group, from
the first group to the last, is over before the next one begins fulfils every wait; no wait depends on who comes first,
and therefore no other run gets stuck.
"""

from __future__ import annotations

from typing import Final

from fxopt.codegen.attention.hopper.config import Config
from fxopt.codegen.template import fill

#: The first of the barriers, of 16. Those of `gl.warp_specialize` come first, two and one to each group.
FIRST: Final = 8
#: Threads that meet at one: of the group that takes the baton, and of the one that passes it.
_THREADS: Final = 256
_FUNCTIONS: Final = '''
@gluon.jit
def take_baton(member):
    """Wait until the baton has been passed to group ``member``, this one."""
    text: gl.constexpr = "bar.sync $$1, $threads; mov.b32 $$0, $$1;"
    return gl.inline_asm_elementwise(text, "=r,r", [$first + member], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_baton(member):
    """Pass the baton to group ``member``."""
    text: gl.constexpr = "bar.arrive $$1, $threads; mov.b32 $$0, $$1;"
    return gl.inline_asm_elementwise(text, "=r,r", [$first + member], dtype=gl.int32, is_pure=False, pack=1)

'''
_HOLES: Final = {
    "offer_baton": "if MEMBER == GROUPS - 1:\n    pass_baton(0)",
    "take_baton": "take_baton(MEMBER)",
    "keep_baton": "if MEMBER == 0:\n    take_baton(0)",
}
_NEXT: Final = "pass_baton((MEMBER + 1) % GROUPS)"


def functions(config: Config) -> str:
    """The functions that take the baton and pass it on."""
    return "" if config.baton is None else fill(_FUNCTIONS, {"first": str(FIRST), "threads": str(_THREADS)})


def holes(config: Config) -> dict[str, str]:
    """Their calls; ``pass_baton_n`` is where ``config.baton`` is ``n``.

    0: both products are on their way; 1: the products of queries and keys are there, while those of weights and values
    may still be waited for; 2: all products are there, which are waited for when the maxima of the block are known.
    """
    passed = {f"pass_baton_{n}": _NEXT if config.baton == n else "" for n in range(3)}
    return passed | (dict.fromkeys(_HOLES, "") if config.baton is None else _HOLES)
