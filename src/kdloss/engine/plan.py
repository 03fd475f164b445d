"""The order in which tasks are computed, chosen so that they share as much work as possible."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch

from kdloss.engine.closed_forms import WITHOUT_SCRATCH, ClosedForm
from kdloss.engine.rows import identity
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.targets import TopKLogits
from kdloss.targets.kinds import Classes
from kdloss.targets.sharded import Shard

OLD = torch.torch_version.TorchVersion(torch.__version__) < "2.6"  # its compiler for CPUs fuses less


class Closed(NamedTuple):
    """A task's number, and its divergence's closed form."""

    k: int
    form: ClosedForm


@dataclass
class Group:
    """The tasks that read the same classes of the student at the same temperature, by number.

    `labels` are the cross-entropies. `closed` has the divergences with a closed form under the number of the first
    task with their teacher; `own` has that teacher's temperature where it differs from the student's.
    """

    temperature: float
    classes: Classes = None
    labels: list[int] = field(default_factory=list)
    closed: dict[int, list[Closed]] = field(default_factory=dict)
    own: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Tasks by number: those that share the student's exponentials, those with a top-k teacher, and the others.

    A task's value is the computed one times its entry in `sizes`, and its gradient the slope times that in `slopes`.
    """

    groups: list[Group]
    top_k: list[int] = field(default_factory=list)
    by_autograd: list[int] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)

    @property
    def coarseness(self) -> int:
        """How many times more rows to take at a time: top-k work alone needs little memory beside the gradient."""
        return 4 if self.top_k and not (self.groups or self.by_autograd) else 1

    @property
    def scratch(self) -> bool:
        """Whether compiled work on a block of rows needs scratch memory as large as its logits."""
        if OLD or self.top_k or len(self.groups) != 1 or self.groups[0].classes is not None:
            return True
        forms: list[Any] = [closed.form for closed in chain(*self.groups[0].closed.values())]
        return len(forms) > 1 or any(form.func not in WITHOUT_SCRATCH for form in forms)

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> "Plan":
        """Put every task where it is computed fastest."""
        groups: dict[tuple[Hashable, float], Group] = {}
        of_teacher: dict[Hashable, int] = {}
        labels: list[int] = []
        top_k: list[int] = []
        others: list[int] = []
        sizes, slopes = [1.0] * len(tasks), [1.0] * len(tasks)
        for k, task in enumerate(tasks):
            if isinstance(task, LabelTask):
                labels.append(k)
                continue
            is_top_k = isinstance(task.teacher, TopKLogits)
            if task.vocabulary is not None or getattr(task.teacher, "tail", None) == "uniform":
                others.append(k)
            elif task.closed_form is None:
                (top_k if is_top_k else others).append(k)
            else:
                form, sizes[k] = task.closed_form
                slopes[k] = sizes[k] / task.temperature
                if is_top_k:
                    top_k.append(k)
                    continue
                key = identity(task.student_classes), task.temperature
                group = groups.setdefault(key, Group(task.temperature, task.student_classes))
                own = task.teacher_temperature
                same = of_teacher.setdefault((*key, own, identity(task.teacher), identity(task.teacher_classes)), k)
                group.closed.setdefault(same, []).append(Closed(k, form))
                if own is not None:
                    group.own[same] = own
        if labels:  # cross-entropies use the exponentials of a group over all classes, if there is one
            over_all = [group.temperature for group in groups.values() if group.classes is None]
            host = next((t for t in (1.0, 2.0, *over_all) if t in over_all), 1.0)
            groups.setdefault((None, host), Group(host)).labels += labels
        return cls(list(groups.values()), top_k, others, sizes, slopes)


def check_sharded(tasks: Sequence[Task], shard: Shard | None) -> None:
    """Raise for divergences that can't be computed from sums over the vocabulary, the only thing processes share."""
    if shard is not None and any(isinstance(task, TeacherTask) and task.closed_form is None for task in tasks):
        raise ValueError(
            "over a sharded vocabulary there are cross-entropy and the divergences with a closed form: "
            "forward, reverse, symmetric and skewed KL, JSD and total variation, of logits or LazyLogits"
        )
