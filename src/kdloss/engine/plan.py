"""In which order tasks are computed, so that they share most."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from kdloss.engine.rows import identity
from kdloss.engine.task import LabelTask, Task, TeacherTask
from kdloss.targets import Shard, TopKLogits


@dataclass
class Group:
    """What reads the student at one temperature, by number: labels, and by teacher divergences in closed form."""

    labels: list[int] = field(default_factory=list)
    top_k: list[int] = field(default_factory=list)
    closed: dict[Hashable, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Tasks in the order that shares most: by the student's temperature, and there by teacher."""

    tasks: Sequence[Task]
    groups: dict[float, Group]
    by_autograd: list[int]

    @property
    def coarseness(self) -> int:
        """How much longer the way of a few rows is, whatever their number: autograd's graph is built for each."""
        return 2 if self.by_autograd or any(group.top_k for group in self.groups.values()) else 1

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> "Plan":
        """Every task where it is computed fastest."""
        groups: dict[float, Group] = {}
        others = []
        for k, task in enumerate(tasks):
            if isinstance(task, LabelTask):
                continue
            teacher = task.teacher
            if task.vocabulary is None and isinstance(teacher, TopKLogits) and teacher.tail != "uniform":
                groups.setdefault(teacher.temperature, Group()).top_k.append(k)
            elif task.closed_form is None or isinstance(teacher, TopKLogits):
                others.append(k)
            else:
                group = groups.setdefault(task.temperature, Group())
                group.closed.setdefault(identity(teacher), []).append(k)
        labels = [k for k, task in enumerate(tasks) if isinstance(task, LabelTask)]
        if labels:  # from whichever exponentials are there
            host = next((t for t in (1.0, 2.0, *groups) if t in groups), 1.0)
            groups.setdefault(host, Group()).labels += labels
        return cls(tasks, groups, others)


def check_sharded(tasks: Sequence[Task], shard: Shard | None) -> None:
    """Only sums over the vocabulary go over processes."""
    if shard is not None and any(isinstance(task, TeacherTask) and task.closed_form is None for task in tasks):
        raise ValueError(
            "over a sharded vocabulary there are cross-entropy and the divergences with a closed form: "
            "forward, reverse, symmetric and skewed KL, JSD and total variation, of logits or LazyLogits"
        )
