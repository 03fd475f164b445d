"""The guide to choosing (docs/guide.md) as a function: give two models, get a criterion with reasons."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdloss import _checks
from kdloss.advice import rules
from kdloss.advice.facts import Pair, facts
from kdloss.advice.rules import Goal, Method, Quality, Task
from kdloss.criteria import FeatureKD, VanillaKD

SETTINGS = ("method", "temperature", "alpha", "layers", "pairing", "distance")
WIDTH = 80
NOTE = "What was measured are held-out perplexities of small language models, less is better: docs/results.md."


@dataclass(frozen=True)
class Advice:
    """The result of `kdloss.suggest`. Printed, it is a table of settings with reasons.

    - `method`: "vanilla", "feature" or "both". `smaller`: how many times smaller the student is.
    - `temperature`: applied to both models' logits. `alpha`: the share of cross-entropy. `layers`, `pairing` and
      `distance`: settings of `kdloss.FeatureKD`. Settings that the method doesn't use are None.
    - `reasons`: a sentence for each setting, by name. `warnings`: further advice.
    """

    method: Method
    smaller: float
    temperature: float | None
    alpha: float
    layers: str | None
    pairing: str | None
    distance: Callable[..., Any] | None
    reasons: Mapping[str, str]
    warnings: tuple[str, ...]

    def criterion(self, **settings: Any) -> VanillaKD | FeatureKD:
        """Build the suggested `kdloss.VanillaKD` or `kdloss.FeatureKD`; `settings` add to or replace its own."""
        said = {name: value for name in SETTINGS[1:] if (value := getattr(self, name)) is not None}
        if self.method == "vanilla":
            return VanillaKD(**said | settings)
        return FeatureKD(**said | {"logit_weight": float(self.method == "both")} | settings)

    def __str__(self) -> str:
        rows = [("", "suggested", "because")]
        for name, reason in self.reasons.items():
            value = getattr(self, name)
            shown = f"{value:.2f}x" if name == "smaller" else getattr(value, "__name__", str(value))
            rows.append((name, shown, reason))
        first, second = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
        lines = []
        for name, shown, reason in rows:
            start, *rest = textwrap.wrap(reason, WIDTH - first - second)
            lines += [f"{name:{first}}{shown:{second}}{start}", *(" " * (first + second) + line for line in rest)]
        for warning in self.warnings:
            lines += ["", *textwrap.wrap(f"warning: {warning}", WIDTH)]
        return "\n".join([*lines, "", *textwrap.wrap(NOTE, WIDTH)])


def suggest(
    student: nn.Module | float,
    teacher: nn.Module | float,
    *,
    teacher_quality: Quality = "strong",
    task: Task = "hard",
    goal: Goal = "safe",
) -> Advice:
    r"""Suggest a method, temperature, alpha, layers, pairing and distance for a student and its teacher, with reasons.

    It follows the rules of thumb in docs/guide.md, where r is the teacher's parameters divided by the student's:

    - $T$ is 1 to 1.5 for $r < 2$, 2 to 3 for $2 \le r \le 4$, 4 to 6 for $r > 4$, and 7 to 10 if the architectures
      differ.
    - $\alpha$ is 0.2 to 0.3 for a strong teacher and an easy task and 0.4 to 0.5 for a strong teacher and a hard
      task. For a moderate teacher it is 0.5 to 0.6 (easy) and 0.6 to 0.7 (hard), for a weak teacher 0.7 to 0.9, and
      0.2 to 0.4 if features are compared.
    - Features are for models of one family. Beyond $r = 10$ there is little to gain.

    Our measurements (docs/results.md) are of small language models. For these, and if only sizes are known, the
    measurements override the rules. For other models the rules apply, with the end of each range that is nearer to the
    measurements.

    - `student`, `teacher`: models, before they are sharded, or numbers of parameters. Tied weights count once, all
      experts of a mixture count, and a quantised weight counts as many parameters as it represents. Two models are of
      one family if one `config.model_type` contains the other (bert, distilbert); without it, if the models or their
      blocks are of the same class.
    - `teacher_quality`: how good the teacher is on this task: "strong", "moderate" or "weak". A weak teacher is hardly
      better than the student alone.
    - `task`: "easy" or "hard" for the student.
    - `goal`: "safe" is the method that beat training alone under every strong teacher, "quality" the best result, and
      "speed" the choice if time or memory is short.

    Returns an `Advice`. Its `criterion()` is a recipe ready to use. If widths differ, `kdloss.Distillation` builds the
    projection when it is created, before the optimizer; for models whose configuration doesn't give the widths, call
    its `prepare(**batch)`.

    Raises: TypeError for an argument that is neither a model nor a number; ValueError for a size that isn't above 0, a
    model without parameters, and other words than these.

    >>> import kdloss
    >>> advice = suggest(1.1e9, 7e9, goal="quality")
    >>> advice.method, advice.temperature, advice.alpha, advice.layers
    ('both', 1.0, 0.3, 'last')
    >>> print(suggest(nn.Linear(4, 3), nn.Linear(4, 3)).reasons["smaller"])
    15 parameters against 15; whether architectures are alike is not known
    >>> isinstance(advice.criterion(causal=True), kdloss.FeatureKD)
    True
    """
    _checks.choice("teacher_quality", teacher_quality, ("strong", "moderate", "weak"))
    _checks.choice("task", task, ("easy", "hard"))
    _checks.choice("goal", goal, ("safe", "quality", "speed"))
    pair = Pair(facts("student", student), facts("teacher", teacher))
    method = rules.method(pair, goal)
    chosen = {"method": method}
    if method.value != "feature":
        chosen["temperature"] = rules.temperature(pair)
    chosen["alpha"] = rules.alpha(pair, teacher_quality, task, features=method.value != "vanilla")
    if method.value != "vanilla":
        chosen |= rules.features(pair)
    values: dict[str, Any] = dict.fromkeys(SETTINGS)
    values |= {name: setting.value for name, setting in chosen.items()}
    return Advice(
        **values,
        smaller=pair.smaller,
        reasons={"smaller": rules.sizes(pair)} | {name: setting.reason for name, setting in chosen.items()},
        warnings=tuple(rules.warnings(pair, goal)),
    )
