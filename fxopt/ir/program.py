"""A program: one captured graph in the fxopt dialect, with what is needed to call it and to explain it.

The dialect is pre-dispatch functional ATen (``linear``, ``layer_norm``, ``softmax``,
``scaled_dot_product_attention`` are
whole) plus the canonical operators of `fxopt.ir.operators`. Every node carries ``meta["val"]`` (fake tensors, symbolic
shapes), the user's line and the owning module. In-place edits of the program's own inputs stand as ``copy_`` at the
end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _make_graph_module, _use_lazy_graph_module
from torch.utils import _pytree as pytree

from fxopt.ir.held import Held

Entry = Literal["dynamo", "export"]


@dataclass(frozen=True)
class Signature:
    """How the flat placeholders of a structurally captured program map back to the model's call.

    ``bound`` maps a placeholder name to the parameter, buffer or constant it stands for; the remaining placeholders are
    the user's inputs, flattened by ``in_spec``. ``outputs`` of the graph are unflattened by ``out_spec``.
    """

    bound: dict[str, str]
    constants: dict[str, torch.Tensor]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec

    def __deepcopy__(self, memo: dict[int, Any]) -> Signature:
        return self  # nobody writes into it


@dataclass
class Program:
    """A graph of the dialect. Passes edit ``module.graph`` in place; the pipeline hands each pass its own copy.

    ``frozen`` says that whoever runs the program computes what depends on the weights alone once, and again only when
    a weight changes. Only then may a pass fold one weight into another: otherwise every call would pay for it.

    ``held`` are the buffers among the inputs, by the name of the placeholder: whoever runs the program checks at each
    call that those that are ``assumed`` hold what they held (`fxopt.ir.held`).
    """

    module: fx.GraphModule
    entry: Entry
    signature: Signature | None = None
    notes: list[str] = field(default_factory=list)
    frozen: bool = False
    held: Mapping[str, Held] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        """The graph that passes read and edit."""
        return self.module.graph

    @property
    def code(self) -> str:
        """The program as readable Python, with shapes, dtypes and the user's lines."""
        text: str = self.module.print_readable(print_output=False)
        return text

    @property
    def fake_mode(self) -> FakeTensorMode | None:
        """The fake-tensor mode of the metadata; ``None`` for a graph without tensors."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        return None

    def copy(self) -> Program:
        """A program whose graph can be edited without touching this one; parameters and constants are shared."""
        graph = fx.Graph()
        output: Any = graph.graph_copy(self.graph, {}, return_output_node=True)
        value, old = output
        graph.output(value).meta.update(old.meta)
        # Lazy: the Python code of a copy is generated only if somebody runs or prints it.
        with _use_lazy_graph_module(True):
            module = _make_graph_module(self.module, graph, "Program")
        module.meta.update(self.module.meta)
        return replace(self, module=module, notes=list(self.notes), assumed=set(self.assumed))

    def generated(self) -> fx.GraphModule:
        """The module with its Python code generated, in its copies too: Dynamo traces only code.

        A lazy module generates it when it is first run, and so does each copy of one that was run.
        """
        if isinstance(self.module, _LazyGraphModule):
            self.module = fx.GraphModule(self.module, self.graph, "Program")
        return self.module

    def operators(self) -> Counter[str]:
        """How often each operator occurs: ``{"aten.linear": 6, "fxopt.attention": 1}``."""
        return Counter(operator_name(n) for n in self.graph.nodes if n.op == "call_function")


def operator_name(node: fx.Node) -> str:
    """``aten.linear`` for an operator call, the Python name for anything else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.partition('::')[2]}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
