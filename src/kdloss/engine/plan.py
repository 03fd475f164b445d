"""In which order tasks are computed, so that they share most."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kdloss.engine.closed_forms import ClosedForm
from kdloss.engine.rows import identity
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.targets import TopKLogits
from kdloss.targets.sharded import Shard


class Closed(NamedTuple):
    """A task by its number, with its divergence's closed form and the factor of that."""

    k: int
    task: TeacherTask
    form: ClosedForm
    size: float


@dataclass
class Group:
    """What reads the student at one temperature: labels, top-k teachers, and by teacher what has a closed form."""

    labels: list[tuple[int, LabelTask]] = field(default_factory=list)
    top_k: list[tuple[int, TeacherTask]] = field(default_factory=list)
    closed: dict[Hashable, list[Closed]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Tasks by number: those that share the student's exponentials by its temperature, and the others."""

    groups: dict[float, Group]
    by_autograd: list[tuple[int, TeacherTask]]

    @property
    def coarseness(self) -> int:
        """How much more is to be done for a few rows however few they are: autograd builds a graph for each."""
        return 2 if self.by_autograd or any(group.top_k for group in self.groups.values()) else 1

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> "Plan":
        """Every task where it is computed fastest."""
        groups: dict[float, Group] = {}
        labels, others = [], []
        for k, task in enumerate(tasks):
            if isinstance(task, LabelTask):
                labels.append((k, task))
            elif _few_classes(task):
                groups.setdefault(task.teacher.temperature, Group()).top_k.append((k, task))  # type: ignore[union-attr]
            elif task.closed_form is None or isinstance(task.teacher, TopKLogits):
                others.append((k, task))
            else:
                of_teacher = groups.setdefault(task.temperature, Group()).closed
                of_teacher.setdefault(identity(task.teacher), []).append(Closed(k, task, *task.closed_form))
        if labels:  # from whichever exponentials are there
            host = next((t for t in (1.0, 2.0, *groups) if t in groups), 1.0)
            groups.setdefault(host, Group()).labels += labels
        return cls(groups, others)


def _few_classes(task: TeacherTask) -> bool:
    teacher = task.teacher
    return task.vocabulary is None and isinstance(teacher, TopKLogits) and teacher.tail != "uniform"


def check_sharded(tasks: Sequence[Task], shard: Shard | None) -> None:
    """Only sums over the vocabulary go over processes."""
    if shard is not None and any(isinstance(task, TeacherTask) and task.closed_form is None for task in tasks):
        raise ValueError(
            "over a sharded vocabulary there are cross-entropy and the divergences with a closed form: "
            "forward, reverse, symmetric and skewed KL, JSD and total variation, of logits or LazyLogits"
        )
