"""The modules that a torch.fx graph calls. Modules that contain them keep their names and are never called."""

from torch import fx, nn


def is_graph(model: nn.Module) -> bool:
    """Whether a model was traced by torch.fx, as quantisation does."""
    return isinstance(model, fx.GraphModule)


def called(model: nn.Module, inside: nn.Module) -> list[str]:
    """Names of the modules inside `inside` that torch.fx graphs in the model call, in the order of the calls.

    >>> traced = fx.symbolic_trace(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    >>> called(traced, traced.get_submodule("0"))
    ['0.0', '0.1']
    """
    candidates = set(inside.modules())
    return [
        f"{name}.{node.target}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_module" and module.get_submodule(node.target) in candidates
    ]
