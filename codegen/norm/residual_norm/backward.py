"""From a residual norm to the source of its backward kernels.

With ``n`` the normalised row, ``g = dnormal * weight`` and means over the row,

    ds = (g - mean(g) - n * mean(g * n)) * scale + dsum        (RMSNorm has no mean(g))
    dweight = Σ_rows dnormal * n,   dbias = Σ_rows dnormal

Every program adds up the gradients of the weights over its own rows, and a second kernel adds up what they found: no
atomics, so that two runs agree to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fxopt.codegen.norm.residual_norm import template
from fxopt.codegen.norm.residual_norm.text import RowsText, name_of, rounded, widened
from fxopt.codegen.template import fill, listing

_TITLES: Final = {
    "layer_norm": "Gradients of a residual sum and its LayerNorm",
    "rms_norm": "Gradients of a residual sum and its RMSNorm",
}
#: What each weight's gradient adds up, per element.
_TERMS: Final = {"weight": "dnormal{n} * {multiplied}", "bias": "dnormal{n}"}


@dataclass(frozen=True)
class BackwardText(RowsText):
    """The source for one problem and configuration; ``wanted`` of weight and bias get gradients."""

    wanted: tuple[str, ...] = ()

    def __str__(self) -> str:
        holes = {**self.holes, **self._kernel, **self._partial, **self._reduce, **self._launch}
        reduction = fill(template.REDUCE, holes) if self.wanted else ""
        launch = fill(template.LAUNCH_BACKWARD, holes)
        script = self.script(template.MAIN_BACKWARD, holes)
        return fill(template.HEADER, holes) + fill(template.BACKWARD, holes) + reduction + launch + script

    @property
    def _names(self) -> list[str]:
        statistics = ["mean", "scale"] if self.centred else ["scale"]
        weight = ["weight"] if self.problem.weight is not None else []
        return ["dnormal", "dsum", "sum", *statistics, *weight, "dx", *(f"d{name}_partial" for name in self.wanted)]

    @property
    def _kernel(self) -> dict[str, str]:
        problem, width = self.problem, self.problem.width
        total = widened("tl.load(sum_row + c{n}, mask={mask}, other=0.0)", problem.total)
        normal = f"({total} - mean) * scale" if self.centred else f"{total} * scale"
        dnormal = widened("tl.load(dnormal_row + c{n}, mask={mask}, other=0.0)", problem.out)
        g = "g{n} = dnormal{n} * weight{n}" if problem.weight is not None else "g{n} = dnormal{n}"
        means = [self.row_sum("products", "g{n} * n{n}"), f"correlation = products / {width}"]
        means += [self.row_sum("slopes", "g{n}"), f"average = slopes / {width}"] if self.centred else []
        gradient = "dx{n} = (g{n} - average - n{n} * correlation) * scale"
        dsum = widened("tl.load(dsum_row + c{n}, mask={mask}, other=0.0)", problem.total)
        return {
            "load_weight": self.load_weights("weight"),
            "load_statistics": "mean = tl.load(mean_ptr + row[:, None], mask=there, other=0.0)" if self.centred else "",
            "load_rows": "\n".join(
                (self.each(f"n{{n}} = {normal}"), self.each(f"dnormal{{n}} = {dnormal}"), self.each(g))
            ),
            "means": "\n".join(means),
            "gradients": self.each(gradient if self.centred else gradient.replace(" - average", "")),
            "add_dsum": self.each(f"dx{{n}} += {dsum}"),
            "store": self.each(f"tl.store(dx_row + c{{n}}, {rounded('dx{n}', problem.total)}, mask={{mask}})"),
        }

    @property
    def _partial(self) -> dict[str, str]:
        shape = f"[{self.config.rows}, {self.chunk}]"
        row = f"program.to(tl.int64) * {self.problem.width}"
        lines, stores = [], []
        for name in self.wanted:
            lines.append(self.each(f"d{name}{{n}} += {_TERMS[name].replace('{multiplied}', self._multiplied)}"))
            place = f"d{name}_partial_ptr + {row} + c{{n}}"
            stores += [
                f"tl.store({place.format(n=n)}, tl.sum(d{name}{n}, 0)[None, :]{self._stored(n)})" for n in self.chunks
            ]
        zeros = [self.each(f"d{name}{{n}} = tl.zeros({shape}, tl.float32)") for name in self.wanted]
        titles = " and what its rows add to those of " + " and ".join(self.wanted) if self.wanted else ""
        return {
            "zeros": "\n".join(zeros),
            "partial": "\n".join(lines),
            "store_partial": "\n".join(stores),
            "partial_title": titles,
        }

    @property
    def _multiplied(self) -> str:
        """What the weight was multiplied by: the normalised value as it was then rounded."""
        total = self.problem.total
        return widened(rounded("n{n}", total), total) if self.problem.scale_after_cast else "n{n}"

    def _stored(self, n: int) -> str:
        inside = self.inside(n)
        return f", mask={inside}" if inside else ""

    @property
    def _reduce(self) -> dict[str, str]:
        width = self.problem.width
        names = [f"d{name}_partial_ptr" for name in self.wanted] + [f"d{name}_ptr" for name in self.wanted]
        read = "tl.sum(tl.load(d{0}_partial_ptr + program.to(tl.int64) * {1} + c, mask=known, other=0.0), 0)"
        store = "tl.store(d{0}_ptr + c, d{0}.to(tl.{2}), mask=c < {1})"
        return {
            "reduce_parameters": listing(names),
            "reduce_zeros": "\n".join(f"d{name} = tl.zeros([16], tl.float32)" for name in self.wanted),
            "reduce_add": "\n".join(f"d{name} += {read.format(name, width)}" for name in self.wanted),
            "reduce_store": "\n".join(store.format(name, width, self._dtype(name)) for name in self.wanted),
        }

    def _dtype(self, name: str) -> str:
        return name_of(getattr(self.problem, name)) if name in self.wanted else "float32"

    @property
    def _launch(self) -> dict[str, str]:
        problem, width = self.problem, self.problem.width
        given = {"sum": "total", "dx": "dx", "dsum": "dnormal if dsum is None else dsum"}
        moved = 3 * problem.total.itemsize + problem.out.itemsize
        partial = "d{0}_partial = torch.empty((programs, {1}), dtype=torch.float32, device=total.device)"
        arguments = [f"d{name}_partial" for name in self.wanted] + [f"d{name}" for name in self.wanted]
        call = f"reduce_kernel[({-(-width // 16)},)]({', '.join(arguments)}, programs, num_warps=8)"
        return {
            "title": _TITLES[problem.kind],
            "maths": self.maths(),
            "meaning": "rows of a program at once, warps, programs per multiprocessor",
            "parameters": listing(f"{name}_ptr" for name in self._names),
            "arguments": listing(given.get(name, name) for name in self._names),
            "many": str(self.config.programs),
            "dweight": self._dtype("weight"),
            "dbias": self._dtype("bias"),
            "dweight_size": str(width if "weight" in self.wanted else 0),
            "dbias_size": str(width if "bias" in self.wanted else 0),
            "scratch": "\n".join(partial.format(name, width) for name in self.wanted),
            "reduce_launch": call if self.wanted else "",
            "bytes": str(moved),
        }
