"""The guide to choosing (docs/guide.md) as a function: two models in, a criterion and its reasons out."""

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
    """What `kdloss.suggest` suggests. Printed, it is a table with the reason of each.

    - `method`: "vanilla", "feature" or "both"; `smaller`: how many times smaller the student is.
    - `temperature`, `alpha`: of both models' predictions, and the share of cross-entropy; `layers`, `pairing`,
      `distance`: those of `kdloss.FeatureKD`. What the method doesn't use is None.
    - `reasons`: a sentence for each of these, by its name; `warnings`: what else to know.
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
        """The recipe, `kdloss.VanillaKD` or `kdloss.FeatureKD`; `settings` are its own, beside or in place of these."""
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
    r"""Method, temperature, alpha, layers, pairing and distance for a student and its teacher, with reasons.

    The rules of thumb of docs/guide.md, by r = the teacher's parameters over the student's:

    - $T$ is 1 to 1.5 for $r < 2$, 2 to 3 for $2 \le r \le 4$, 4 to 6 for $r > 4$, and 7 to 10 where architectures
      are unlike.
    - $\alpha$ is 0.2 to 0.3 for a strong teacher and an easy task, 0.4 to 0.5 for a strong one and a hard task, 0.5
      to 0.6 and 0.6 to 0.7 for a moderate one, 0.7 to 0.9 for a weak one, 0.2 to 0.4 where features are compared.
    - Features are for models of one family; beyond $r = 10$ little is to be had.

    What we measured (docs/results.md) was measured on small language models, and goes before the rule for them and
    where only sizes are known. For others the rule holds, and of its range the end that is nearer to the measured.

    - `student`, `teacher`: models, before they are sharded, or their numbers of parameters. Tied weights count
      once, all experts of a mixture, and quantised ones as many as they stand for. Families go by
      `config.model_type`, where one name may hold the other (bert, distilbert); without it by the class of the
      model or of its blocks.
    - `teacher_quality`: what the teacher is worth on this task; a weak one is hardly better than the student alone.
    - `task`: "easy" or "hard" for the student.
    - `goal`: "safe" is what was ahead of training alone wherever the teacher was strong, "quality" as much as can be
      had, "speed" where time or memory is short.

    Returns an `Advice`; its `criterion()` is a recipe ready to use. Widths that differ get their projection where
    the criterion meets the models, in `kdloss.Distillation`, before the optimizer; of models without a configuration
    that tells them by its `prepare(**batch)`.

    Raises: TypeError for what is no model and no number; ValueError for a size that isn't above 0, a model without
    parameters, and words other than these.

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
