"""`Distilling`, a mixin that makes any Trainer distil, and `DistillationTrainer`."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from kdloss import _checks
from kdloss._inputs import named
from kdloss.adapter import evaluating, measuring, takes_input
from kdloss.distiller import Distiller
from kdloss.hf.checkpoints import WholeCheckpoints
from kdloss.hf.counts import as_labels, refuse_elsewhere
from kdloss.hf.criteria import always_cross_entropy, reads_index
from kdloss.hf.learning import Learning
from kdloss.hf.means import Means
from kdloss.layers.names import unwrap
from kdloss.teacher import Teacher
from kdloss.terms.contract import Contract

_OF_THE_LOSS = ("mask", "feature_mask", "index", "teacher")
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
    - `count`: the number of labels that divides the loss when gradients are accumulated. Labels that the criterion
      leaves out (by `ignore_index`, `mask` or `attention_mask`) are never counted. "trainer" divides as the Trainer
      does, so that the term of the task equals the Trainer's loss: by the Trainer's count, if the student takes one. It
      may include labels that are never predicted (of all causal models in transformers 4, of some in 5). If the student
      ignores it, or terms with `positions="mask"` stand beside others, a step is the mean of its batches' means; the
      logger "kdloss" warns where the plain Trainer wouldn't divide. "student" divides by the number of positions that
      count, so that batches and processes always add up to one big batch.
    - `args`, `settings`: the Trainer's own arguments.

    A criterion that is only cross-entropy, like `VanillaKD(alpha=1.0)`, is left to the Trainer: the loss is the plain
    Trainer's. The Trainer's log has the terms as means over batches: `ce` and `kd` in training, and in evaluation
    `eval_ce` and `eval_kd` beside `eval_loss`, the student's own loss. Columns that only a teacher reads are kept, and
    so are `mask` and `feature_mask`.

    If the Trainer has a `compute_loss` of its own, as TRL's trainers have, the criterion replaces its loss. The
    Trainer's `compute_loss` still runs, without gradient, for the values that it logs: one more pass of the student.

    `train(resume_from_checkpoint=True)` resumes from the newest complete checkpoint, or starts if there is none. For a
    model without a Hugging Face configuration, measure the widths with
    `trainer.distill.prepare(trainer.model, **batch)` before `train()`.

    Raises: ValueError for several GPUs in one process, for FSDP or DeepSpeed if the criterion has parameters, for an
    optimizer without these, for `label_smoothing_factor` or `compute_loss_func`, for a `mask` in a batch that is left
    to the Trainer, and for labels whose number can't divide the loss; and what `kdloss.Distiller` raises.

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
        if not self._left_to_trainer:
            self.loss_is_scaled_for_ga = None  # it is said of the loss that the criterion replaces
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
        own, items = self._own(inputs), num_items_in_batch
        if self._left_to_trainer:
            return super().compute_loss(model, own, return_outputs, num_items_in_batch=items)
        if not self._divides(model, own, items):
            items = None
        if not model.training:
            items = None if self.count == "student" else items
            return super().compute_loss(model, own, return_outputs, num_items_in_batch=items)
        if self._other is not Trainer:
            with torch.no_grad():
                super().compute_loss(model, dict(own), num_items_in_batch=items)

        def distilled(num_items_in_batch: Any = None, **batch: Any) -> Any:
            with self.accelerator.autocast():  # the teacher, too
                out = self.distill(model, **batch, num_items_in_batch=items)
            self._terms.add(out.components, self._share(batch, out, items))
            return out

        taught: Any = distilled  # in place of the student, so that the Trainer scales this loss as it does its own
        return Trainer.compute_loss(self, taught, inputs, return_outputs, num_items_in_batch=items)

    def _own(self, inputs: Any) -> dict[str, Any]:
        """The student's inputs of a batch."""
        others = [name for name in _OF_THE_LOSS if not takes_input(self.model, name, by_name=True)]
        mask = "mask" in others and inputs.get("mask") is not None
        if mask and self._left_to_trainer and self.model.training:
            raise ValueError(
                "the batch has a mask, and a criterion that is only cross-entropy is left to the Trainer, which reads "
                "no mask: leave it out, and write labels of -100 where it is False"
            )
        return {name: x for name, x in named(self.model, inputs).items() if name not in others}

    def _share(self, batch: Any, out: Any, items: Any) -> Any:
        """The part of the step that a batch is, so that the logged terms add up as their losses do."""
        if items is None:
            return 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        where = self.distill.positions(self.model, **batch)
        if where is None:
            return 1.0
        refuse_elsewhere(where, batch, out.output, self._contract)
        return where.count() / items

    def _divides(self, model: Any, inputs: Any, items: Any) -> bool:
        """Whether the student's own loss is divided by the Trainer's count; measured once, for all processes."""
        if items is None or self.count == "student" or self._other is not Trainer:
            return True
        if self._counts is None and self.model_accepts_loss_kwargs:
            with measuring(model):
                outputs = [model(**inputs, num_items_in_batch=count) for count in (items, 8 * items)]
            if isinstance(outputs[0], dict) and "loss" not in outputs[0]:  # all there is is the criterion's
                self._counts = True
                return True
            one, other = (out["loss"] if isinstance(out, dict) else out[0] for out in outputs)
            eighth = (other - one / 8).abs() < (other - one).abs()
            seen = torch.stack([eighth, ~eighth]) & (one != 0) & one.isfinite()
            yes, no = self.accelerator.reduce(seen.float(), "sum").tolist()
            self._counts = yes > no if yes or no else None
            if self._counts is False:
                self._ignored()
        return self._counts is not False

    def _ignored(self) -> None:
        """Tell the Trainer that the student ignores its count, and whoever reads the log what follows."""
        self.model_accepts_loss_kwargs = False  # so that the Trainer divides by the number of micro-batches
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1
        times = self.args.gradient_accumulation_steps * processes
        if times > 1:
            _log.warning(
                "the loss of %s ignores num_items_in_batch, so a step takes the mean of its batches' means; the plain "
                "Trainer of this version divides by nothing here and takes %d times as much. count='student' makes "
                "batches with unequal numbers of labels add up to one",
                type(unwrap(self.model)).__name__,
                times,
            )

    def _items(self, batches: Any, device: Any) -> Any:
        """The number that divides the loss of a step: of the labels that the criterion counts."""
        batches = [self._prepare_inputs(dict(batch)) for batch in batches]
        wheres: list[Any] = [self.distill.positions(self.model, **batch) for batch in batches]
        if any(where is None for where in wheres):
            if self.count == "trainer":
                return None  # the mean of each batch: each term is divided by its own number
            raise ValueError(
                "count='student' divides all terms by one number, known before the student runs; this criterion has "
                "terms with positions='mask' beside others, or the mask doesn't stand at the labels. Write "
                "count='trainer': it takes the mean of each batch here"
            )
        if self.count == "student":
            number: Any = sum(where.count() for where in wheres)
            items = number if isinstance(number, Tensor) else torch.full((), number, device=device)
            return self.accelerator.reduce(items, "sum") if self.args.average_tokens_across_devices else items
        told = [as_labels(where, batch, self._contract) for where, batch in zip(wheres, batches, strict=True)]
        return self._get_num_items_in_batch(told, device)

    @property
    def _contract(self) -> Contract:
        contract: Contract = getattr(self.criterion, "contract", Contract())
        return contract

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step and the number that divides its loss; no batches if all steps are done already."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # the Trainer would do one more step
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, items if items is None or self._left_to_trainer else self._items(batches, device)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the Trainer's columns, those that the teachers read, masks, and `index` if the criterion reads it."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            own = ["mask", "feature_mask", *(["index"] if reads_index(self.criterion) else [])]
            self._signature_columns = [*(self._signature_columns or []), *(self.distill.columns or []), *own]

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The Trainer's step on the student's own inputs; it also computes the terms."""
        if self.teacher_in_eval and not self._left_to_trainer and self._evaluates(inputs):
            batch: Any = self._prepare_inputs(inputs)
            with torch.no_grad(), self.accelerator.autocast(), evaluating(self.criterion):
                terms = self.distill(model, **batch).components
            self._eval_terms.add(terms, find_batch_size(batch) or 1)  # type: ignore[no-untyped-call]
        return super().prediction_step(model, self._own(inputs), prediction_loss_only, ignore_keys)

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
