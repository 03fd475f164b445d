"""`Distilling`, a mixin that makes any Trainer distil, and `DistillationTrainer`."""

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
    r"""A mixin that makes a Trainer distil: `class SFTDistiller(kdloss.hf.Distilling, SFTTrainer): pass`.

    The training loss is the criterion's, from one pass of the student and at most one pass of each teacher. The rest is
    the Trainer's work: it trains and saves the student.

    - `teacher`: a model, a `kdloss.Teacher`, None for a stored teacher, or a list of these. A model follows the student
      to its device. The collator gives a stored teacher's outputs as `"teacher"`.
    - `criterion`: a `kdloss.Sum` or a recipe. Its parameters are optimised, clipped, averaged over processes, saved
      beside the student as `criterion.safetensors` and resumed. `advance()` is called after each step.
    - `teacher_in_eval`: True computes the terms in evaluation too.
    - `count`: the number of labels that divides the loss when gradients are accumulated. "trainer" divides as the
      Trainer does, so that the term of the task equals the Trainer's loss: by the Trainer's count, if the student takes
      one (in transformers 4 it includes labels that a causal model never predicts), else as the mean of each batch.
      "student" divides by the number of labels that the student predicts, so that batches and processes always add up
      to one big batch.
    - `args`, `settings`: the Trainer's own arguments.

    A criterion that is only cross-entropy, like `VanillaKD(alpha=1.0)`, is left to the Trainer. The Trainer's log has
    the terms as means over batches: `ce` and `kd` in training, and in evaluation `eval_ce` and `eval_kd` beside
    `eval_loss`, the student's own loss. Columns that only a teacher reads are kept.

    If the Trainer has a `compute_loss` of its own, as TRL's trainers have, the criterion replaces its loss. The
    Trainer's `compute_loss` still runs, without gradient, for the values that it logs: one more pass of the student.

    `train(resume_from_checkpoint=True)` resumes from the newest complete checkpoint, or starts if there is none. For a
    model without a Hugging Face configuration, measure the widths with
    `trainer.distill.prepare(trainer.model, **batch)` before `train()`.

    Raises: ValueError for several GPUs in one process, for FSDP or DeepSpeed if the criterion has parameters, for an
    optimizer without these, and for `label_smoothing_factor` or `compute_loss_func`; and what `kdloss.Distiller`
    raises.

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
        if self.distill.columns is None or None in self.distill.teachers:  # inputs of the teacher or keys of its store
            self.args = copy.copy(self.args)
            self.args.remove_unused_columns = False

    def _begin(self, student: Any) -> None:
        with torch.random.fork_rng(devices=[]):  # so that data order and dropout are those of a run without a teacher
            self.distill.prepare(student)
        self.criterion.to(self.args.device)
        self._at_start = copy.deepcopy(self.criterion.state_dict())
        for teacher in self.distill.teachers:
            if teacher is not None:
                teacher.follow(self.args.device)

    def call_model_init(self, trial: Any = None) -> Any:
        """Make a new student and reset the criterion; `trial` is the Trainer's."""
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
                f"one process sees {self.args.n_gpu} GPUs and would run copies of the student, where hooks don't work; "
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
                "kdloss.Distillation with Accelerate, or use a criterion that learns nothing"
            )
        if self._other is not Trainer:
            _log.warning(
                "the criterion replaces the loss of %s, which is still computed, without gradient, for its log",
                self._other.__name__,
            )

    @property
    def _other(self) -> type:
        """The class behind this one whose loss the criterion replaces."""
        behind = type(self).__mro__[type(self).__mro__.index(Distilling) + 1 :]
        return next(c for c in behind if "compute_loss" in vars(c))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The criterion's loss in training (with `return_outputs` also a `kdloss.Distilled`), else the Trainer's."""
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

        taught: Any = distilled  # in place of the student, so that the Trainer scales this loss as it does its own
        return Trainer.compute_loss(self, taught, inputs, return_outputs, num_items_in_batch=items)

    def _share(self, batch: Any, divisor: Any) -> Any:
        """The part of the step that a batch is, so that the logged terms add up as their losses do."""
        if divisor is None:
            return 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        return self._labels_in(batch) / divisor

    def _labels_in(self, batch: Any) -> Any:
        """The number of labels in a batch that the student predicts."""
        shifted = batch.get("shift_labels")
        if shifted is None:
            shifted = batch["labels"][..., int(self.distill.shifts(self.model, **batch)) :]
        return (shifted != -100).sum()

    def _divides(self, model: Any, inputs: Any, items: Any) -> bool:
        """Whether the student's own loss is divided by the Trainer's count; measured once, for all processes."""
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
        """The Trainer's count, or the number of labels that the student predicts."""
        theirs = super()._get_num_items_in_batch(batch_samples, device)
        if theirs is None or self.count == "trainer" or self._left_to_trainer:
            return theirs
        on_device: list[Any] = [self._prepare_inputs(dict(batch)) for batch in batch_samples]
        items = sum(self._labels_in(batch) for batch in on_device)
        return self.accelerator.reduce(items, "sum") if self.args.average_tokens_across_devices else items

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step; none if all steps are done already, where the Trainer would do one more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the Trainer's columns, those that the teachers read, and `index` if the criterion reads it."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            index = ["index"] if reads_index(self.criterion) else []
            self._signature_columns = [*(self._signature_columns or []), *(self.distill.columns or []), *index]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The Trainer's step on the student's own inputs; it also computes the terms."""
        if self.teacher_in_eval and not self._left_to_trainer and self._evaluates(inputs):
            batch: Any = self._prepare_inputs(inputs)
            with torch.no_grad(), self.accelerator.autocast(), evaluating(self.criterion):
                terms = self.distill(model, **batch).components
            self._eval_terms.add(terms, find_batch_size(batch) or 1)  # type: ignore[no-untyped-call]
        return super().prediction_step(model, named(self.model, inputs), prediction_loss_only, ignore_keys)

    def _evaluates(self, inputs: Any) -> bool:
        """Whether the inputs have what the terms read: a stored teacher's outputs, and labels if they need them."""
        if None in self.distill.teachers and "teacher" not in inputs:
            return False
        plan = getattr(self.criterion, "plan", None)
        needless = plan is not None and not plan(len(self.distill.teachers)).needs_labels
        return needless or all(inputs.get(name) is not None for name in self.label_names)

    def evaluation_loop(self, *args: Any, **settings: Any) -> Any:
        """The Trainer's loop, with the terms among its metrics."""
        self._eval_terms = Means()
        output: Any = super().evaluation_loop(*args, **settings)
        prefix = settings.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._eval_terms.take().items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **settings: Any) -> None:
        """The Trainer's log, with the means of the terms since the last entry beside the training loss."""
        if "loss" in logs:
            logs.update({name: value for name, value in self._terms.take().items() if name not in logs})
        super().log(logs, *args, **settings)


class DistillationTrainer(Distilling, Trainer):
    """Hugging Face's `Trainer` with a teacher and a criterion.

    - `teacher`, `criterion`, `teacher_in_eval`, `count`: see `kdloss.hf.Distilling`, which describes what they do.
    - `args`, `settings`: the Trainer's own arguments.

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
