"""`kdloss.Distillation`: student and criterion in one module."""

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
_uncompiled: Callable[[Method], Method] = torch.compiler.disable  # hooks don't work inside compiled code


class Distillation(nn.Module):
    """Student and criterion in one module: all that is trained, without the teacher.

    The module's children are `student` and `criterion`. `model.parameters()` and `state_dict()` hold the student and
    the projections, so DDP, FSDP, Accelerate or a Trainer synchronise, shard, clip and save both. Teachers are not
    children. A teacher follows the student to another device, unless it has a device of its own (`kdloss.Teacher`), and
    never changes its dtype. A copy of the module shares the teachers; a pickle includes them.

    - `student`: the model to train. Save and load `model.student` as you would without distillation.
    - `teacher`: a model, a `kdloss.Teacher`, None for a stored teacher, or a list of these.
    - `criterion`: a `kdloss.Sum` or a recipe like `kdloss.FeatureKD()`. Its projections are built here if the models'
      configurations tell the widths. Otherwise call `prepare` before you make the optimizer.
    - `teacher_in_eval`: True runs the teachers in eval mode too. False runs only the student there, and the loss is
      that of the terms that read no teacher: for the named recipes plain cross-entropy, whatever alpha is. It is None
      without labels.

    Call it like the student, `model(**batch)` or `model(x, labels=y)`. It also takes `mask`, `feature_mask`,
    `num_items_in_batch` and `teacher` (a stored teacher's outputs for this batch), as `kdloss.Distiller` does. It
    returns a `kdloss.Distilled` with `loss`, `logits`, `components` and `output`, as attributes and as keys.
    `torch.compile(model)` runs it uncompiled; compile blocks of the student instead.

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
        """The teachers, which are not children of this module."""
        return self._distiller.teachers

    @property
    def config(self) -> Any:
        """The student's configuration, if it has one: a Trainer, DeepSpeed and loggers look for it here."""
        return self.student.config

    @property
    def loss_type(self) -> Any:
        """The student's `loss_type`, if it has one, by which a Trainer knows whether first labels are predicted."""
        return self.student.loss_type

    def prepare(self, *args: Any, **batch: Any) -> "Distillation":
        """Build the projections for widths measured on a batch; call it before making the optimizer.

        `args` and `batch` are a batch as the forward takes it: `prepare(**batch)`, `prepare(x)`.
        """
        self._distiller.prepare(self.student, *args, **batch)
        return self

    def tie_weights(self) -> None:
        """Tie the student's weights again, if it ties any; Accelerate calls this after it sharded a model."""
        tie = getattr(self.student, "tie_weights", None)
        if callable(tie):
            tie()

    # `labels` has its own parameter since Hugging Face's Trainer looks for it in the signature.
    @_uncompiled
    def forward(self, *args: Any, labels: Any = None, teacher: Any = None, **batch: Any) -> Distilled:
        """One step: `args` and `batch` go to the models; see the class."""
        if self._distiller.criterion is not self.criterion:
            raise RuntimeError(
                "the criterion was replaced after the module was made; write Distillation(model.student, teacher, "
                "criterion), before you make the optimizer"
            )
        self._gather()
        teach = self.training or self.teacher_in_eval or teacher is not None
        return self._distiller(self.student, *args, labels=labels, teacher=teacher, teach=teach, **batch)

    def _gather(self) -> None:
        """Move the teachers to the student's device; the student may have been moved by itself."""
        home = place(self.student)
        for teacher in self.teachers:
            if teacher is not None and home is not None:
                teacher.follow(home)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Distillation":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._gather()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load student and criterion; `args` and `options` are those of `nn.Module.load_state_dict`.

        Call `prepare` first: the projections whose parameters are in `state_dict` have to exist.
        """
        with told_to_prepare(self.criterion, state_dict, "model.prepare(**batch)", "criterion."):
            return super().load_state_dict(state_dict, *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        twin = copy.copy(self)
        memo[id(self)] = twin
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin
