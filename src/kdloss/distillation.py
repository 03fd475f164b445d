"""Student and criterion as one module to train."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from kdloss.distilled import Distilled
from kdloss.distiller import Distiller
from kdloss.teacher import Teacher, place
from kdloss.terms._loading import told_to_prepare

Method = TypeVar("Method", bound=Callable[..., Any])
_uncompiled: Callable[[Method], Method] = torch.compiler.disable  # hooks are seen beside compiled code only


class Distillation(nn.Module):
    """Student and criterion in one module, so that whatever trains it sees all that learns, and nothing of a teacher.

    Its children are `student` and `criterion`: `model.parameters()` holds the projections, `state_dict()` both, and
    DDP, FSDP, Accelerate or a Trainer synchronise, shard, clip and save them. Teachers are no children. They follow the
    student from device to device unless they have one of their own (`kdloss.Teacher`), never to another dtype; a copy
    of the module shares them, a pickle holds them.

    - `student`: the model to train; `model.student` saves and reloads as ever.
    - `teacher`: a model, a `kdloss.Teacher`, None for a stored one, or a list of these.
    - `criterion`: a `kdloss.Sum` or a recipe like `kdloss.FeatureKD()`. Its projections are built here where the
      models' configurations tell their widths, else by `prepare`; before the optimizer.
    - `teacher_in_eval`: whether teachers run in eval mode, too. Without them the loss is then the task's own: of the
      terms that read no teacher, for the named recipes plain cross-entropy whatever alpha; None without labels.

    Called like the student, `model(**batch)` or `model(x, labels=y)`, and with what `kdloss.Distiller` takes beside:
    `mask`, `feature_mask`, `num_items_in_batch`, and `teacher`, what a stored teacher said of this batch. Returns a
    `kdloss.Distilled`: `loss`, `logits`, `components`, `output`, as attributes and as keys. Compiled as a whole it runs
    as it is; what stays fast is compiled blocks of the student.

    Raises: what `kdloss.Distiller` raises.

    >>> import kdloss
    >>> model = Distillation(nn.Linear(4, 3), nn.Linear(4, 3), kdloss.VanillaKD())
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.randn(2, 4), labels=torch.tensor([0, 2])).loss.backward()
    >>> sorted(model.state_dict())
    ['student.bias', 'student.weight']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | Sequence[nn.Module | Teacher | None] | None,
        criterion: nn.Module,
        *,
        teacher_in_eval: bool = False,
    ) -> None:
        super().__init__()
        self._distiller = Distiller(teacher, criterion).prepare(student)
        self.student, self.criterion = student, self._distiller.criterion
        self.teacher_in_eval = teacher_in_eval

    @property
    def teachers(self) -> list[Teacher | None]:
        """The teachers, which are no children of this module."""
        return self._distiller.teachers

    def prepare(self, *args: Any, **batch: Any) -> "Distillation":
        """Build the projections, of widths measured on a batch, before the optimizer.

        `args` and `batch` are a batch as the forward takes it: `prepare(**batch)`, `prepare(x)`.
        """
        self._distiller.prepare(self.student, *args, **batch)
        return self

    def tie_weights(self) -> None:
        """Tie the student's weights again, where it ties some: Accelerate asks for it after it has sharded a model."""
        tie = getattr(self.student, "tie_weights", None)
        if callable(tie):
            tie()

    # `labels` by name: Hugging Face's Trainer looks for it in the signature.
    @_uncompiled
    def forward(self, *args: Any, labels: Any = None, teacher: Any = None, **batch: Any) -> Distilled:
        """One step; `args` and `batch` go to the models, and see the class."""
        if self._distiller.criterion is not self.criterion:
            raise RuntimeError(
                "the criterion was replaced after the module was made; write Distillation(model.student, teacher, "
                "criterion), before the optimizer"
            )
        self._gather()
        teach = self.training or self.teacher_in_eval or teacher is not None
        return self._distiller(self.student, *args, labels=labels, teacher=teacher, teach=teach, **batch)

    def _gather(self) -> None:
        """Bring the teachers to the student, who may have been moved without this module."""
        home = place(self.student)
        for teacher in self.teachers:
            if teacher is not None and home is not None:
                teacher.follow(home)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Distillation":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._gather()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load student and criterion, by `nn.Module`'s method and with its `args` and `options`.

        What the criterion has learned, in the `state_dict`, needs its place: call `prepare` before.
        """
        with told_to_prepare(self.criterion, state_dict, "model.prepare(**batch)", "criterion."):
            return super().load_state_dict(state_dict, *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        twin = copy.copy(self)
        memo[id(self)] = twin
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin
