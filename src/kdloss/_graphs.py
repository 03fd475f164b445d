"""Graphs from torch.export or torch.jit, whose mode (training or eval) is fixed in the graph."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.jit import ScriptModule

# Operations that depend on the mode, and the position of the argument that sets it.
_SWITCHES = {
    "dropout": 2,
    "batch_norm": 5,
    "scaled_dot_product_attention": 4,
    # decomposed, by `run_decompositions` or in part by torch 2.4's export itself
    "native_dropout": 2,
    "_native_batch_norm_legit_functional": 5,
}


def refuse_trained(model: nn.Module) -> None:
    """Raise for a teacher whose graph uses dropout or batch statistics in eval mode too.

    Raises: ValueError.
    """
    for name, arguments in _operations(model):
        at = _SWITCHES.get(name)
        if at is not None and len(arguments) > at and arguments[at] not in (False, 0, None):
            raise ValueError(
                f"the teacher's graph was made in training mode ({name} is on in it), which eval() can't change: make "
                "it from model.eval(). If you want this teacher as it is, give a function: lambda *x, **batch: "
                "teacher(*x, **batch)"
            )


def _operations(model: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Names and constant arguments (None for others) of the operations in a model's graphs, if it has any."""
    for module in model.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    yield node.target.__name__.partition(".")[0], [_constant(x) for x in node.args]
    for script in (m for m in model.modules() if isinstance(m, ScriptModule) and hasattr(m, "inlined_graph")):
        for node in script.inlined_graph.nodes():
            given = [x.toIValue() if x.node().kind() == "prim::Constant" else None for x in node.inputs()]
            yield node.kind().removeprefix("aten::"), given


def _constant(x: Any) -> Any:
    return x if isinstance(x, (int, float)) else None
