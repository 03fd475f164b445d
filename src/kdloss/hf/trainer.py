"""A mixin that makes any Trainer distil."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from kdloss import _checks
from kdloss._inputs import named
from kdloss.adapter import evaluating, measuring
from kdloss.distiller import Distiller
from kdloss.hf.checkpoints import WholeCheckpoints
from kdloss.hf.criteria import always_cross_entropy, reads_index
from kdloss.hf.learning import Learning
from kdloss.hf.means import Means
from kdloss.teacher import Teacher

_log = logging.getLogger("kdloss")


class Distilling(WholeCheckpoints, Learning):
    r"""Makes a Trainer distil: `class SFTDistiller(kdloss.hf.Distilling, SFTTrainer): pass`.

    The training loss is the criterion's, of one pass of the student and at most one of each teacher. All else is the
    Trainer's: the model it trains and saves is the student.

    - `teacher`: a model, a `kdloss.Teacher`, None for a stored one, whose rows the collator gives as `"teacher"`, or a
      list of these. A model follows the student from device to device.
    - `criterion`: a `kdloss.Sum` or a recipe. What it learns is optimised, clipped, averaged over processes, saved
      beside the student as `criterion.safetensors` and resumed; `advance()` is called after each step.
    - `teacher_in_eval`: whether the terms are evaluated, too.
    - `count`: whose labels a loss is divided by where batches are accumulated. "trainer" divides as the Trainer would,
      so that the task's term is its loss: its count, for a student that takes one, which in transformers 4 holds labels
      that a causal model never predicts; the mean of each batch, for one that ignores it. "student" divides by the
      labels that the student predicts, so that batches and processes add up to one big batch whatever it does.
    - `args`, `settings`: the Trainer's own arguments.

    A criterion that is cross-entropy and nothing else, like `VanillaKD(alpha=1.0)`, is left to the Trainer. The terms
    are in its log, each batch's mean: `ce` and `kd` in training, `eval_ce` and `eval_kd` in evaluation beside
    `eval_loss`, which is the student's own. Columns that teachers read are kept.

    Where the Trainer has a `compute_loss` of its own, as TRL's have, the criterion takes the place of its loss; it is
    run beside it, without gradient, for what it logs: one more pass of the student.

    `train(resume_from_checkpoint=True)` goes on from the newest whole checkpoint, or begins where there is none. The
    widths of a model without a Hugging Face configuration are measured by
    `trainer.distill.prepare(trainer.model, **batch)`, before `train()`.

    Raises: ValueError for several GPUs in one process, for FSDP or DeepSpeed where the criterion learns, for an
    optimizer without what it learns, for `label_smoothing_factor` or `compute_loss_func` beside it; whatever
    `kdloss.Distiller` raises.

    >>> from transformers import Trainer
    >>> class MyTrainer(Distilling, Trainer):
    ...     pass
    >>> MyTrainer.__mro__[1].__name__
    'Distilling'
    """

    model: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | Teacher | Sequence[nn.Module | Teacher | None] | None,
        criterion: nn.Module,
        teacher_in_eval: bool = True,
        count: Literal["trainer", "student"] = "trainer",
        **settings: Any,
    ) -> None:
        _checks.choice("count", count, ("trainer", "student"))
        self.distill = Distiller(teacher, criterion)
        self.criterion: Any = self.distill.criterion
        self.teacher_in_eval, self.count = teacher_in_eval, count
        self._left_to_trainer = always_cross_entropy(self.criterion)
        super().__init__(*args, **settings)
        self._counts: bool | None = None
        self._terms, self._eval_terms = Means(), Means()
        self._begin(self.model)
        self._refuse()
        if count == "student" and not self._left_to_trainer:
            self.model_accepts_loss_kwargs = True  # the criterion does
        if self.distill.columns is None or None in self.distill.teachers:  # a teacher, or who reads a stored one's rows
            self.args = copy.copy(self.args)
            self.args.remove_unused_columns = False

    def _begin(self, student: Any) -> None:
        with torch.random.fork_rng(devices=[]):  # so that order and dropout are those of a run without a teacher
            self.distill.prepare(student)
        self.criterion.to(self.args.device)
        self._at_start = copy.deepcopy(self.criterion.state_dict())
        for teacher in self.distill.teachers:
            if teacher is not None:
                teacher.follow(self.args.device)

    def call_model_init(self, trial: Any = None) -> Any:
        """A new student; what the criterion learned of another one is forgotten."""
        student = super().call_model_init(trial)
        if hasattr(self, "_at_start"):
            self.criterion.load_state_dict(self._at_start)
            self.distill.prepare(student)
        return student

    def _refuse(self) -> None:
        if self._left_to_trainer:
            return
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs and would run copies of the student, which no hook reaches; "
                f"start it by torchrun --nproc-per-node {self.args.n_gpu} SCRIPT, or with CUDA_VISIBLE_DEVICES=0"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "the criterion computes the loss; leave out label_smoothing_factor and compute_loss_func, and write "
                "kdloss.CrossEntropy(label_smoothing=...) or kdloss.Task(function) into the sum"
            )
        if self._learned and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "the criterion learns projections, which the Trainer doesn't shard under FSDP or DeepSpeed: train a "
                "kdloss.Distillation with Accelerate, or a criterion that learns nothing"
            )
        if self._other is not Trainer:
            _log.warning(
                "the criterion takes the place of the loss of %s, which is computed without gradient, for its log",
                self._other.__name__,
            )

    @property
    def _other(self) -> type:
        """The class behind this one whose loss the criterion takes the place of."""
        behind = type(self).__mro__[type(self).__mro__.index(Distilling) + 1 :]
        return next(c for c in behind if "compute_loss" in vars(c))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training the criterion's loss, and with `return_outputs` a `kdloss.Distilled`; else the Trainer's."""
        own, items = named(self.model, inputs), num_items_in_batch
        if not model.training and self.count == "student":
            items = None
        if self._left_to_trainer or not model.training:
            return super().compute_loss(model, own, return_outputs, num_items_in_batch=items)
        if self._other is not Trainer:
            with torch.no_grad():
                super().compute_loss(model, dict(own), num_items_in_batch=items)
        divisor = items if self._divides(model, own, items) else None

        def distilled(num_items_in_batch: Any = None, **batch: Any) -> Any:
            with self.accelerator.autocast():  # the teacher, too
                out = self.distill(model, **batch, num_items_in_batch=divisor)
            self._terms.add(out.components, self._share(batch, divisor))
            return out

        taught: Any = distilled  # in the student's place, so that the Trainer scales this loss as it does its own
        return Trainer.compute_loss(self, taught, inputs, return_outputs, num_items_in_batch=items)

    def _share(self, batch: Any, divisor: Any) -> Any:
        """How much of the step a batch is, so that terms add up as their losses do."""
        if divisor is None:
            return 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        return self._labels_in(batch) / divisor

    def _labels_in(self, batch: Any) -> Any:
        """How many labels of a batch the student predicts."""
        shifted = batch.get("shift_labels")
        if shifted is None:
            shifted = batch["labels"][..., int(self.distill.shifts(self.model, **batch)) :]
        return (shifted != -100).sum()

    def _divides(self, model: Any, inputs: Any, items: Any) -> bool:
        """Whether the student's own loss is divided by the Trainer's count: measured once, for all processes alike."""
        if items is None or self.count == "student" or self._other is not Trainer:
            return True
        if self._counts is None and self.model_accepts_loss_kwargs:
            with measuring(model):
                outputs = [model(**inputs, num_items_in_batch=count) for count in (items, 8 * items)]
            one, other = (out["loss"] if isinstance(out, dict) else out[0] for out in outputs)
            eighth = (other - one / 8).abs() < (other - one).abs()
            seen = torch.stack([eighth, ~eighth]) & (one != 0) & one.isfinite()
            yes, no = self.accelerator.reduce(seen.float(), "sum").tolist()
            self._counts = yes > no if yes or no else None
        return self._counts is not False

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        """The Trainer's count, or that of the labels which the student predicts."""
        theirs = super()._get_num_items_in_batch(batch_samples, device)
        if theirs is None or self.count == "trainer" or self._left_to_trainer:
            return theirs
        on_device: list[Any] = [self._prepare_inputs(dict(batch)) for batch in batch_samples]
        items = sum(self._labels_in(batch) for batch in on_device)
        return self.accelerator.reduce(items, "sum") if self.args.average_tokens_across_devices else items

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step; none where the last step was done before, and the Trainer would do one more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the Trainer keeps, and those that the teachers name or the criterion is given."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            index = ["index"] if reads_index(self.criterion) else []
            self._signature_columns = [*(self._signature_columns or []), *(self.distill.columns or []), *index]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The Trainer's, of the student's own inputs; the terms are noted beside it."""
        if self.teacher_in_eval and not self._left_to_trainer and self._evaluates(inputs):
            batch: Any = self._prepare_inputs(inputs)
            with torch.no_grad(), self.accelerator.autocast(), evaluating(self.criterion):
                terms = self.distill(model, **batch).components
            self._eval_terms.add(terms, find_batch_size(batch) or 1)  # type: ignore[no-untyped-call]
        return super().prediction_step(model, named(self.model, inputs), prediction_loss_only, ignore_keys)

    def _evaluates(self, inputs: Any) -> bool:
        """Whether the terms have what they read: a stored teacher's rows, and labels, unless they need none."""
        if None in self.distill.teachers and "teacher" not in inputs:
            return False
        plan = getattr(self.criterion, "plan", None)
        needless = plan is not None and not plan(len(self.distill.teachers)).needs_labels
        return needless or all(inputs.get(name) is not None for name in self.label_names)

    def evaluation_loop(self, *args: Any, **settings: Any) -> Any:
        """The Trainer's, with the terms among the metrics."""
        self._eval_terms = Means()
        output: Any = super().evaluation_loop(*args, **settings)
        prefix = settings.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._eval_terms.take().items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **settings: Any) -> None:
        """The Trainer's, with the means of the terms since the last line beside the training loss."""
        if "loss" in logs:
            logs.update({name: value for name, value in self._terms.take().items() if name not in logs})
        super().log(logs, *args, **settings)


class DistillationTrainer(Distilling, Trainer):
    """Hugging Face's `Trainer`, distilling.

    `teacher`, `criterion`, `teacher_in_eval` and `count` are those of `kdloss.hf.Distilling`, which says what is done;
    `args` and `settings` are the Trainer's own arguments.

    >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    >>> import kdloss
    >>> shape = dict(num_attention_heads=2, intermediate_size=8, vocab_size=9, bos_token_id=0, eos_token_id=0)
    >>> teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, hidden_size=16, **shape))
    >>> student = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=8, **shape))
    >>> plain = dict(report_to="none", disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no")
    >>> arguments = TrainingArguments("runs/trainer", max_steps=1, **plain)
    >>> data = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}]
    >>> criterion = kdloss.FeatureKD(layers="auto")
    >>> trainer = DistillationTrainer(student, arguments, teacher=teacher, criterion=criterion, train_dataset=data)
    >>> done = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...
    >>> done.global_step
    1
    """
