"""`kdloss.Distiller`: runs teachers and student on a batch and computes the criterion's loss."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from kdloss import _watch
from kdloss._capture import Captured
from kdloss._inputs import of_student, refuse_taken, taken_by
from kdloss._masks import positions_ahead
from kdloss._own_loss import OwnLoss, own_loss, refuse_unread
from kdloss._runner import Batch, Runner
from kdloss.adapter import measuring
from kdloss.distilled import Distilled
from kdloss.layers.names import modules_of, unwrap
from kdloss.reduction import on_cpu
from kdloss.teacher import Teacher, refuse_functions
from kdloss.terms import Plan
from kdloss.terms._ahead import Ahead
from kdloss.terms._outputs import logits_read, part_of
from kdloss.terms._positions import Positions
from kdloss.terms.contract import Contract
from kdloss.terms.sum import as_criterion

_log = logging.getLogger("kdloss")
_OF_THE_LOSS = {"mask", "feature_mask", "num_items_in_batch", "index", "teacher", "teach", "shift_labels"}
_NOTHING = Plan({}, {}, {})


class Distiller:
    """Runs student and teachers once each on a batch and returns the criterion's loss.

    Teachers run one after the other, in eval mode and without gradient; their mode and weights stay as they were. A
    teacher whose logits aren't needed stops after the deepest block that is read. A teacher that no term of weight
    above 0 reads isn't run. A `Distiller` is not a module: no parameter list or state dict includes a teacher.

    - `teachers`: a model, a `kdloss.Teacher`, None for a stored teacher, or a list of these.
    - `criterion`: a `kdloss.Sum` or a recipe, whose `plan` says in each step what it reads. Any other module is called
      with what was captured of student and teacher (`.output` is what the model returned), labels, `mask` and
      `num_items_in_batch`; the logger "kdloss" warns of what such a module doesn't get.

    Call it as `distill(student, *args, labels=..., **inputs)` with the inputs of the models. Each model gets the
    inputs that its forward names (all of them, if it takes `**kwargs`). An input that no model reads is refused, and so
    is one given by position that would be another input to a teacher. A mask counts whichever way it is given.

    - `labels`: go to the criterion; an encoder-decoder's decoder inputs are made from them. A model whose logits depend
      on its labels (ArcFace) gets them by position, too: `distill(student, x, y, labels=y)`. `shift_labels` are labels
      that are shifted already.
    - `mask`: boolean, True = keep; takes positions of labels and logits out of every term.
    - `feature_mask`: the same for positions of features, for all terms or as a dict by term name (None: all count).
    - `num_items_in_batch`, `index`: passed to the criterion, see `kdloss.Sum`. `index` is which example of the data
      set each example is.
    - `teacher`: the outputs of a stored teacher for this batch; a list if there are several stored teachers.

    The batch's own `attention_mask` and `decoder_attention_mask` take positions out too, where they apply: a speech
    model's mask is mapped to frames by the model's own length function, a text mask applies only to the tower that
    reads the text, and with `causal` the logits of padding on the left are taken out. If a term's `vocabulary` is a
    `TokenMap`, its teacher reads the student's tokens translated to its own ids, and its own padding where the mask is
    0. Returns a `Distilled` with `loss`, `logits`, `components` and `output`, without the virtual tokens of prompt
    tuning.

    If the criterion has no `causal`, the first batch shows whether logits at t learn label t+1: one pass of the student
    with labels, in eval mode and without gradient, is compared with the student's own loss. Named losses that the
    student adds to its cross-entropy (`aux_loss` of a mixture of experts) are added here too, with the student's own
    coefficients.

    Hugging Face language models make no full logits `[B, T, V]`: the criterion gets hidden states and head as
    `LazyLogits`, with the same loss and gradients. Where that isn't possible, the logger "kdloss" says why.

    Raises: TypeError for a teacher or an input that nothing reads, and for `mask`, `feature_mask`, `index` or `teacher`
    where a model's forward has an input of that name (pass the model's by position); ValueError for a term whose
    teacher is missing, for labels `[B, T]` if nothing shows whether they are shifted, for padded rows if a model takes
    no `attention_mask`, for packed rows that a model reads as one document (measured on the first batch whose
    `position_ids` start again), for a mask that fits nothing, and for a teacher that runs on weights that the student
    trains (use `kdloss.base_of` for the base under adapters). Errors of the criterion and of capture pass through.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> import kdloss
    >>> shape = dict(n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    >>> teacher = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=16, **shape))
    >>> student = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, **shape))
    >>> distill = kdloss.Distiller(teacher, kdloss.FeatureKD(layers="auto")).prepare(student)
    >>> tokens = torch.tensor([[1, 2, 3, 4]])
    >>> out = distill(student, input_ids=tokens, labels=tokens)
    >>> sorted(out.components)
    ['ce', 'feature', 'feature/0-0', 'feature/1-5']
    """

    def __init__(
        self,
        teachers: nn.Module | Teacher | Sequence[nn.Module | Teacher | None] | None,
        criterion: nn.Module,
    ) -> None:
        self.criterion = as_criterion(criterion)
        self._as_list = isinstance(teachers, (list, tuple, nn.ModuleList))
        given: Any = teachers if self._as_list else [teachers]
        self.teachers = [t if t is None or isinstance(t, Teacher) else Teacher(t) for t in given]
        self._plans = _plans(self.criterion)
        if any(t is not None and _plans(t.module) for t in self.teachers):
            raise TypeError(
                f"got a criterion as the teacher, and {type(criterion).__name__} as the criterion; write "
                "Distiller(teacher, criterion), Distillation(student, teacher, criterion)"
            )
        if self._plans:
            self.criterion.check_teachers(len(self.teachers))
            refuse_functions(self.criterion, self.teachers)
        else:
            _log.warning(
                "%s has no `plan` that says what it reads: full logits are made, teachers run to their end, no "
                "features are captured and nothing is prepared. A loss of your own gets all of that as a term: "
                "kdloss.Task(function), or a module that inherits from kdloss.terms.Term",
                type(criterion).__name__,
            )
        self._prepared_for: weakref.ref[nn.Module] | None = None
        self._own: OwnLoss | None = None
        self._run = Runner(self.teachers, self._plans)
        self._told = self._saw_labels = False

    def prepare(self, student: nn.Module, *args: Any, **batch: Any) -> "Distiller":
        """Pair the blocks of `student` and teachers and build the projections; call it before making the optimizer.

        `args` and `batch` are a batch as the call takes it. With a batch, the widths of the features, and the sizes of
        maps for pairing="resolution", are measured on it. Without one, widths are read from Hugging Face
        configurations.
        """
        self._settle(student)
        if self._plans:
            self.criterion.prepare(student, self._modules)
            if args or batch:
                self._measure(student, args, batch)
        return self

    def __call__(
        self,
        student: nn.Module,
        *args: Any,
        labels: Any = None,
        mask: Bool[Tensor, "..."] | None = None,
        feature_mask: Bool[Tensor, "..."] | Mapping[str, Tensor | None] | None = None,
        num_items_in_batch: int | Tensor | None = None,
        index: Int[Tensor, " batch"] | None = None,
        teacher: Any = None,
        teach: bool = True,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Distilled:
        """One forward pass of each model, and the loss; see the class. `teach=False` runs no teacher."""
        self._settle(student)
        self._refuse_taken(student, args, mask=mask, feature_mask=feature_mask, index=index, teacher=teacher)
        own = self._own_loss(student, args, inputs, labels)
        stored = self._stored(teacher)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn(student)
        plan, batch = self._plan(teach), Batch(args, inputs, labels, shift_labels)
        contract = self.criterion.contract if self._plans else Contract()
        ahead = _ahead(contract, own, labels, shift_labels, mask) if plan.weights else None
        with_labels = plan.own_loss or own.of_labels
        seen = self._run.study(student, plan, batch, with_labels)
        if not self._saw_labels and labels is not None and not with_labels and isinstance(seen.output, Tensor):
            self._warn_of_labels(student, args)
        labels = labels if shift_labels is None else shift_labels
        asked = plan.needs_labels or (plan.own_loss and part_of(seen.output, "loss") is None)
        if not teach and (not plan.weights or (labels is None and asked)):
            return Distilled.of(None, seen.output, {})
        outputs = self._run.outputs(student, plan, batch, stored)
        settings: dict[str, Any] = {"num_items_in_batch": num_items_in_batch}
        causal = self._plans and shift_labels is None and self._causal(contract, student, own, plan, seen, labels)
        masks = self._run.masks(student, seen, plan, batch, mask, feature_mask, causal=causal, own_loss=with_labels)
        settings |= masks
        settings |= {} if index is None else {"index": index}
        if self._plans:
            settings |= {"causal": causal, "task_terms": own.added(seen.output)}
            settings |= {} if ahead is None else {"ahead": ahead}
            loss = self.criterion(seen, outputs, labels, plan=plan, **settings)
        else:
            every = list(outputs)
            loss = self.criterion(seen, every if self._as_list else every[0], labels, **settings)
        return Distilled.of(loss, seen.output, dict(getattr(self.criterion, "components", {})))

    def _warn(self, student: nn.Module) -> None:
        """Warn once of projections that no optimizer trains, and of projections whose gradients nothing zeroes."""
        if not _trains(self.criterion):
            return
        _watch.watch(student, self.criterion, _log)
        if not self._told and _watch.left_over(student, self.criterion):
            self._told = True
            _log.warning(
                "the criterion's parameters still have gradients of the step before, the student's have none: they add "
                "up. Write optimizer.zero_grad() for the criterion's parameters too, or train a kdloss.Distillation, "
                "whose zero_grad() reaches both"
            )

    def _warn_of_labels(self, student: nn.Module, args: tuple[Any, ...]) -> None:
        """Warn of a student that returns a tensor, and so no loss, and takes labels: they may change its logits."""
        self._saw_labels = True
        if "labels" in taken_by(student)[0][len(args) :]:
            _log.warning(
                "the forward of %s takes labels and got none, since the criterion computes the loss. If they change "
                "its logits, as the margin of ArcFace does, pass them by position, too: model(x, y, labels=y), and "
                "kdloss.Teacher(teacher, inputs=lambda x, y: x) for a teacher that takes none",
                type(unwrap(student)).__name__,
            )

    def _refuse_taken(self, student: nn.Module, args: tuple[Any, ...], **keywords: Any) -> None:
        """Raise for a keyword of the loss that a model names, too.

        Models' own losses also take `num_items_in_batch` and `shift_labels`, with the same meaning.
        """
        given = [name for name, x in keywords.items() if x is not None]
        if given:
            teachers = (t.module for t in self.teachers if t is not None and t.inputs is None)
            refuse_taken([student, *teachers], args, given)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_prepared_for": None}

    def _plan(self, teach: bool) -> Plan:
        """The criterion's plan for this step."""
        if not self._plans:
            return _NOTHING
        plan: Plan = self.criterion.plan(len(self.teachers)) if teach else self.criterion.plan_of_task()
        return plan

    @property
    def columns(self) -> list[str] | None:
        """The inputs that the teachers read: don't drop these columns, even if the student doesn't read them.

        None means all columns, since a teacher's `inputs` is a function of the whole batch.
        """
        there = [teacher for teacher in self.teachers if teacher is not None]
        if any(teacher.inputs is not None for teacher in there):
            return None
        return sorted({name for teacher in there for name in taken_by(teacher.module)[0]} - {"labels"})

    @property
    def _modules(self) -> list[nn.Module | None]:
        """The teachers' models; None for those that are stored or functions."""
        found = (None if t is None else t.module for t in self.teachers)
        return [module if isinstance(module, nn.Module) else None for module in found]

    def _settle(self, student: nn.Module) -> None:
        """Find the student's blocks, once per student."""
        if not isinstance(student, nn.Module):
            raise TypeError(
                f"a Distiller gets the student first, distill(student, **batch) and distill.prepare(student, **batch); "
                f"got {type(student).__name__}"
            )
        if self._prepared_for is not None and self._prepared_for() is student:
            return
        inside = unwrap(student)
        if _plans(getattr(inside, "criterion", None)) and isinstance(getattr(inside, "student", None), nn.Module):
            raise TypeError(
                f"the student is a {type(inside).__name__}, which has a criterion and teachers of its own; give the "
                "model inside, model.student, or train it as it is: model(**batch).loss, transformers.Trainer(model)"
            )
        if self._plans:
            self.criterion.locate(student, self._modules)
        self._prepared_for, self._own, self._saw_labels = weakref.ref(student), None, False

    def shifts(self, student: nn.Module, *args: Any, labels: Any = None, **inputs: Any) -> bool:
        """Whether the student's logits at t are compared with label t+1.

        The criterion's `causal` decides; if it has none, this batch shows it. `args`, `inputs` and `labels` are those
        of the call with this `student`.
        """
        self._settle(student)
        said: bool | None = self.criterion.contract.causal if self._plans else False
        inputs = {name: x for name, x in inputs.items() if name not in _OF_THE_LOSS}
        return bool(self._own_loss(student, args, inputs, labels).causal) if said is None else said

    def positions(
        self,
        student: nn.Module,
        *,
        labels: Tensor,
        mask: Bool[Tensor, "..."] | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Positions | None:
        """The positions of a batch that count for any term, from its labels and masks, before the models run.

        None if no single number divides all terms, since some have `positions="mask"` and others don't, or if `mask`
        doesn't stand at the labels. `labels`, `mask`, `shift_labels` and `inputs` are those of the call with this
        `student`.
        """
        terms = list(getattr(self.criterion, "terms", {}).values())
        if len({term.positions for term in terms}) > 1:
            return None
        causal = shift_labels is None and self.shifts(student, labels=labels, **inputs)
        labels = labels if shift_labels is None else shift_labels
        ignore_index = self.criterion.contract.ignore_index if self._plans else Contract().ignore_index
        return positions_ahead(student, terms, inputs, labels, mask, causal=causal, ignore_index=ignore_index)

    def _own_loss(self, student: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], labels: Any) -> OwnLoss:
        """How the student's own loss reads labels, measured on the first batch, in the same way on every rank."""
        if self._own is None:
            contract = self.criterion.contract if self._plans else Contract()
            inputs = of_student(student, self.teachers, inputs)
            self._own = own_loss(student, args, inputs, labels, contract.ignore_index)
            if self._own is not None and self._own.causal is not None and contract.causal is None:
                _log.info("causal=%s, measured: %s", self._own.causal, self._own)
        return self._own or OwnLoss()

    def _causal(
        self, contract: Contract, student: nn.Module, own: OwnLoss, plan: Plan, seen: Captured, labels: Any
    ) -> bool:
        """Whether logits at t are compared with label t+1: as the criterion says, else as the student's own loss."""
        if contract.causal is not None:
            return contract.causal
        if own.causal is None and getattr(labels, "ndim", 0) == 2:
            logits = logits_read(seen.output, [reads.logits_at for reads in plan.reads.values()])
            try:
                refuse_unread(own, student, logits, labels, contract.ignore_index)
            except (TypeError, ValueError):
                self._own = None  # corrected labels are measured again
                raise
        return bool(own.causal)

    def _stored(self, given: Any) -> list[Any]:
        """The outputs of the stored teachers, as a list."""
        several = given if isinstance(given, list) else [] if given is None else [given]
        places = sum(teacher is None for teacher in self.teachers)
        if len(several) > places:
            raise TypeError(
                f"teacher={'[...]' if isinstance(given, list) else '...'} has the outputs of {len(several)} stored "
                f"teachers, but {places} of the {len(self.teachers)} teachers are stored (given as None); leave it "
                "out, or write None in the place of a stored teacher's model"
            )
        return several

    def _measure(self, student: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self._refuse_taken(student, args, **{name: inputs.get(name) for name in ("mask", "feature_mask", "index")})
        labels = inputs.pop("labels", None)
        batch = Batch(args, {name: x for name, x in inputs.items() if name not in _OF_THE_LOSS}, labels)
        own = self._own_loss(student, args, batch.inputs, labels)
        plan = self.criterion.candidates(len(self.teachers))
        with measuring(student):
            seen = self._run.study(student, plan, batch, plan.own_loss or own.of_labels)
        for k, output in enumerate(self._run.outputs(student, plan, batch)):
            for name in plan.complete_with(k):
                self.criterion.measure(name, seen.of(name), output.of(name))
        self.criterion.to(next(student.parameters()).device)


def _ahead(contract: Contract, own: OwnLoss, labels: Any, shift_labels: Any, mask: Tensor | None) -> Ahead | None:
    """Ask the device how many positions count, before it starts on the models' passes."""
    given = labels if shift_labels is None else shift_labels
    if not isinstance(given, Tensor) or on_cpu(given.device):
        return None
    causal = shift_labels is None and (own.causal if contract.causal is None else contract.causal)
    return Ahead.of(given, mask, causal=bool(causal), ignore_index=contract.ignore_index)


def _plans(module: Any) -> bool:
    """Whether a criterion has a `plan`, which says what it reads."""
    return callable(getattr(module, "plan", None))


def _trains(criterion: nn.Module) -> bool:
    """Whether a criterion has parameters to train."""
    every = (module._parameters for module in modules_of(criterion) if module._parameters)
    return any(p is not None and p.requires_grad for own in every for p in own.values())
