"""Which keys the tiles of a Hopper kernel need, beside the bounds of the mask: hulls and their order, or lists."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Final

from fxopt.codegen.attention.hopper.config import Config
from fxopt.codegen.attention.hopper.order import Order
from fxopt.codegen.attention.logits import LogitsText
from fxopt.codegen.attention.portable import hull_lists
from fxopt.codegen.attention.portable.hull import Hull
from fxopt.codegen.attention.portable.hull_lists import HullLists
from fxopt.codegen.attention.portable.key_lists import LISTS, KeyLists
from fxopt.codegen.attention.possible import possible_keys

#: Without hulls all blocks ask the mask, which with so many keys costs more than finding the hulls.
_FEWEST: Final = 384


class NeededKeys(LogitsText):
    """The text around what runs before a kernel with this configuration, and tells it which keys are needed."""

    config: Config
    #: The shared memory that results leave through, when all have left.
    _left: ClassVar[str] = "q_tiles.index(MEMBER)"

    @property
    def _functions(self) -> str:
        """The text of what runs before the kernel."""
        small = "".join(found.kernel for found in (self._hull, self._order, self._key_lists) if found is not None)
        return small + LISTS * self.config.listed

    @property
    def _ranged(self) -> bool:
        """Whether late rows need more keys than early ones."""
        return any(b.follows_rows for b in self.range.side("upper"))

    @cached_property
    def _hull(self) -> Hull | None:
        found = None if self.config.listed else possible_keys(self.spec, sure=True)
        config, fewest = self.config, min(4, _FEWEST // self.config.keys)
        if found is None:
            return None
        listed = config.ahead == 0 and hull_lists.can_list(self.spec, found)
        return Hull(self.spec, found, config.rows, config.keys, self._orderly, True, fewest, listed)

    @cached_property
    def _order(self) -> Order | None:
        """The order of tiles by their hulls."""
        if self._hull is None or not self._hull.ordered:
            return None
        return Order(self._hull, self._left, "0.0" if self.spec.empty_rows == "zero" else 'float("nan")')

    @property
    def _orderly(self) -> bool:
        """Whether tiles are put in order of their hulls; where rows bound keys too, long and short ones are paired."""
        return not self._ranged

    @property
    def _sure(self) -> bool:
        """Whether captured vectors can tell that every row keeps the keys of a block."""
        return self._hull is not None and self._hull.possible.sure is not None

    @property
    def _hull_names(self) -> tuple[str, ...]:
        hull = ("hull_start", "hull_stop") if self._hull else ()
        return (*hull, *(("sure_start", "sure_stop") if self._sure else ()))

    @property
    def _hull_lists(self) -> HullLists | None:
        return None if self._hull is None else self._hull.lists

    @cached_property
    def _key_lists(self) -> KeyLists | None:
        return KeyLists(self.spec, self.config.rows, self.config.keys) if self.config.listed else None

    @property
    def _hull_limits(self) -> str:
        """The lines that read the hull of a tile, or find its list."""
        if self._key_lists is not None:
            return self._key_lists.address("row").replace("tl.cdiv", "gl.cdiv")
        if self._hull is None:
            return ""
        limits = self._hull.limits.replace("first // BLOCK_M", "row")
        lists = [] if self._hull.lists is None else [self._hull.lists.address("row")]
        return "\n".join((limits, *lists)).replace("tl.cdiv", "gl.cdiv")

    @property
    def _small_kernels(self) -> dict[str, str]:
        """The launcher's lines around those that tell which blocks of keys are needed."""
        if self._key_lists is not None:
            return {"allocate_hull": self._key_lists.allocate, "launch_hull": self._key_lists.launch}
        if self._hull is None:
            return {"allocate_hull": "", "launch_hull": ""}
        return {"allocate_hull": self._hull.allocate, "launch_hull": (self._order or self._hull).launch}
