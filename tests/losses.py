"""The table of all losses that `kdloss.divergences` and `kdloss.distances` export."""

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import oracles
import torch

from kdloss import distances, divergences
from kdloss.reduction import takes

# The tolerance against the oracle on the same rounded inputs. 16-bit inputs are computed in float32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


# The options with which the laws are checked. Divergences are also checked at several temperatures.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "jsd": [{}, *({"beta": beta, "normalize": True} for beta in (0.0, 1.0, 0.1, 1e-4))],
    "skewed_forward_kl": [{}, {"skew": 0.0}],
    "skewed_reverse_kl": [{}, {"skew": 0.0}],
    "adaptive_kl": [{}, {"head": 0.9}],
    "alpha_divergence": [{}, *({"alpha": alpha} for alpha in (0.0, 1 - 1e-4, 1.0))],
    "renyi": [{}, *({"order": order} for order in (1 - 1e-4, 2.0))],
    "ab_divergence": [{}, *({"alpha": a, "beta": b} for a, b in ((1.0, 0.0), (0.0, 1.0), (1e-4, 0.5)))],
    "sinkhorn": [{"epsilon": 0.3}],
    "dkd": [{}, {"alpha": 2.0, "beta": 0.5}],
    "dist": [{}, {"gamma": 0.0}],
    "attention_transfer": [{}, {"paper": True}],
    "cka": [{}, {"unbiased": True}],
    "attention_mse": [{"heads": 2}, {"heads": 1, "causal": True}],
    "minilm": [{"heads": 2}, {"heads": 1, "causal": True}],
    "MGD": [{"size": (1, -1)}],
    "CRD": [{"width": 4, "negatives": 6, "temperature": 0.5}],
    "minilm_v2": [{"relation_heads": 2}, {"relation_heads": 3, "parts": 1, "causal": True}],
    "activation_boundary": [{}, {"margin": 0.5}],
    "correlation_congruence": [{}, {"gamma": 1.0, "order": 4}],
    "cwd": [{}, {"temperature": 1.0}],
    "fsp": [{}, {"split": 1}],
    "smooth_l1": [{}, {"beta": 3.0}],
    "standardized_mse": [{}, {"eps": 0.1}],
    "word_relation": [{}, {"window": 3, "triple_weight": 0.5}],
}
# Laws that a loss breaks by definition, as its docstring says. `_exempt` adds "relational" where a loss takes a mask,
# because it compares positions with each other, and "width" where `any_width` allows a teacher of another width.
EXEMPT = {
    "logit_mse": {"shift"},
    "bernoulli_kl": {"shift"},
    "nkd": {"teacher"},  # its first term is a cross-entropy
    "hard_labels": {"teacher"},  # a cross-entropy: its minimum is not at the teacher
    "dist": {"relational"},
    "attention_transfer": {"alone"},  # one position is enough
    "attention_mse": {"alone"},  # a text may be one token
    "minilm": {"alone"},
    "VID": {"teacher", "negative"},  # a log-likelihood
    "MGD": {"teacher", "alone", "place"},  # each value depends on the neighbours on the grid
    "CRD": {"teacher", "alone"},  # contrastive: it depends on the negatives as well
    "minilm_v2": {"alone"},
    "fsp": {"alone"},
    "standardized_mse": {"batch"},  # it uses the teacher's variance over all positions of the call
    "activation_boundary": {"teacher"},  # it asks for a margin beyond the teacher's activations
    "sinkhorn": {"few"},  # time and memory grow with the square of the classes
    "with_teacher_temperature": {"teacher"},  # 0 where both are equal after softening
    "uld": {"vocabulary", "kink"},
    "total_variation": {"kink"},
    "adaptive_kl": {"frozen"},  # its weights are constants for the gradient
}
# Divergences that refuse a top-k teacher, and those that need every class in its place and so take only tail="uniform".
NO_TOP_K = {"logit_mse", "bernoulli_kl", "uld", "with_teacher_temperature"}
BY_CLASS = {"dist", "dkd", "nkd", "hard_labels", "sinkhorn"}
# The number of which the width must be a multiple, for each distance.
MULTIPLE = {"attention_mse": 4, "minilm": 6, "minilm_v2": 6}
TEMPERATURES = (0.5, 1.0, 10.0)


@dataclass(frozen=True)
class Loss:
    """A loss, its oracle, and the settings of both."""

    name: str
    function: Any
    oracle: Any
    kind: str
    settings: dict[str, Any]
    exempt: frozenset[str] = frozenset()
    scale: float = 1.0
    multiple: int = 1

    def at(self, temperature: float) -> "Loss":
        """The same loss at another temperature."""
        return replace(self, settings={**self.settings, "temperature": temperature})

    def width(self, least: int) -> int:
        """The smallest width from `least` on that the loss takes: the heads of the queries and keys must divide it."""
        return -(-least // self.multiple) * self.multiple

    def sample(self, *shape: int, **options: Any) -> tuple[Any, Any]:
        """A student that requires gradient, and a teacher, with the width rounded up to one that the loss takes."""
        return sample(*shape[:-1], self.width(shape[-1]), **options)

    def call(self, student: Any, teacher: Any, **more: Any) -> Any:
        """The loss of these logits or features, with labels made from their shape if it takes labels."""
        if self.labelled:
            more.setdefault("labels", labels_for(student.shape, student.device))
        return self.function(student, teacher, **self.settings, **more)

    def expected(self, s: Any, t: Any) -> Any:
        """The value of the oracle, in float64."""
        more = {"labels": labels_for(s.shape).numpy()} if self.labelled else {}
        return self.oracle(s, t, **self.settings, **more)

    def slope(self, s: Any, t: Any) -> Any:
        """The gradient of the sum of the oracle's values."""
        return oracles.gradient(lambda x: self.expected(x, t), s, positions_apart="relational" not in self.exempt)

    def bare(self, student: Any) -> Any:
        """The function with its settings; `kdloss.masked` reads its signature."""
        labels = {"labels": labels_for(student.shape, student.device)} if self.labelled else {}
        return partial(self.function, **self.settings, **labels)

    def takes_top_k(self, tail: str) -> bool:
        """Whether a divergence takes a top-k teacher with this tail."""
        name = self.name.split("-")[0]
        return name not in NO_TOP_K and (tail == "uniform" or name not in BY_CLASS)

    @property
    def labelled(self) -> bool:
        """Whether the loss takes labels."""
        return "labels" in inspect.signature(self.function).parameters

    @property
    def rounding(self) -> float:
        """The rounding error of a sum of probabilities in float32, in units of the loss."""
        return 4 * torch.finfo(torch.float32).eps * self.scale

    def __str__(self) -> str:
        return self.name


def labels_for(shape: Any, device: Any = None) -> torch.Tensor:
    """A class for each position."""
    positions = torch.Size(shape[:-1])
    return (torch.arange(positions.numel(), device=device) * 5 % min(shape[-1], 3)).reshape(positions)


def _table() -> list[Loss]:
    table = []
    wrappers = {"standardized", "with_teacher_temperature"}
    functions = {name: getattr(divergences, name) for name in divergences.__all__ if name not in wrappers}
    functions["standardized_forward_kl"] = divergences.standardized(divergences.forward_kl)
    functions["with_teacher_temperature"] = divergences.with_teacher_temperature(divergences.forward_kl, 3.0)
    functions["sinkhorn"] = sinkhorn_of_scattered
    for name, function in functions.items():
        for options in OPTIONS.get(name, [{}]):
            for temperature in TEMPERATURES if not options else (0.5, 10.0):
                settings = {"temperature": temperature, **options}
                words = "-".join(f"{key}{value}" for key, value in options.items())
                size = temperature**2 * max(1.0, options.get("beta", 8.0 if name == "dkd" else 1.0))
                table.append(
                    Loss(
                        f"{name}-T{temperature}{words and '-' + words}",
                        function,
                        getattr(oracles, name),
                        "divergence",
                        settings,
                        _exempt(name, function),
                        size,
                    )
                )
    for name in sorted({*distances.__all__} - {"between_examples", "between_tokens", "examples", "tokens"}):
        for options in OPTIONS.get(name, [{}]):
            function, oracle = getattr(distances, name), getattr(oracles, name.lower())
            if isinstance(function, type):
                function, oracle = _built(function, oracle, options)
            words = "-".join(f"{key}{value}" for key, value in options.items())
            label = f"{name}{words and '-' + words}"
            exempt = _exempt(name, function)
            settings = {} if function is not getattr(distances, name) else options
            multiple = MULTIPLE.get(name, 1)
            entry = Loss(label, function, oracle, "distance", settings, exempt, multiple=multiple)
            table.append(entry)
    return table


def _built(module: Any, oracle: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """A module as a function of features of any width, and its oracle with the same parameters."""
    modules: dict[Any, Any] = {}

    def at(student: Any, teacher: Any, device: str) -> Any:
        widths = student.shape[-1] if hasattr(module, "any_width") else teacher.shape[-1], teacher.shape[-1]
        if (widths, device) not in modules:
            torch.manual_seed(1)
            modules[widths, device] = module(*widths, **options).eval().to(device)
        return modules[widths, device]

    def relational(student: Any, teacher: Any, *, mask: Any = None) -> Any:
        return at(student, teacher, student.device.type)(student, teacher, mask=mask)

    def positional(student: Any, teacher: Any) -> Any:
        return at(student, teacher, student.device.type)(student, teacher)

    def expected(s: Any, t: Any) -> Any:
        state = at(s, t, "cpu").state_dict()
        return oracle(s, t, {name: value.double().numpy() for name, value in state.items()}, **options)

    function = relational if takes(module.forward, "mask") else positional
    function.any_width = hasattr(module, "any_width")  # type: ignore[attr-defined]
    return function, expected


def _exempt(name: str, function: Any) -> frozenset[str]:
    relational = {"relational"} if takes(function, "mask") else set()
    width = {"width"} if getattr(function, "any_width", False) else set()
    return frozenset({*EXEMPT.get(name, ()), *relational, *width})


def on_a_line(classes: int, device: Any = "cpu") -> torch.Tensor:
    """Costs between classes on a line: their distance, which is 1 between the first and the last."""
    places = torch.linspace(0, 1, classes, dtype=torch.float64, device=device)
    return (places - places[:, None]).abs()


def scattered(classes: int, device: Any = "cpu") -> torch.Tensor:
    """Costs between classes that stay the same when classes are added."""
    places = torch.arange(classes, dtype=torch.float64, device=device) * 0.618 % 1
    return (places - places[:, None]).abs()


def sinkhorn_of_scattered(
    student: Any, teacher: Any, *, temperature: float = 1.0, epsilon: float = 0.3
) -> torch.Tensor:
    """The Sinkhorn divergence with `scattered` costs for the number of classes of the logits."""
    cost = scattered(student.shape[-1], student.device).float()
    return divergences.sinkhorn(student, teacher, cost=cost, temperature=temperature, epsilon=epsilon, iterations=60)


sinkhorn_of_scattered.needs_classes = True  # type: ignore[attr-defined]

LOSSES = _table()
DIVERGENCES = [loss for loss in LOSSES if loss.kind == "divergence"]
DISTANCES = [loss for loss in LOSSES if loss.kind == "distance"]
# Each divergence once with each of its options, for laws in which temperature plays no role.
ONE_EACH = [loss for loss in DIVERGENCES if loss.settings["temperature"] == 0.5]


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Any]:
    """A student that requires gradient, and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()
    return student, (3 * torch.randn(*shape, generator=generator)).to(dtype)
