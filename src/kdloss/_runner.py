"""Run a student and its teachers once each, and only as far as a plan reads them."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from kdloss._capture import Captured
from kdloss._classes import Named
from kdloss._decoder_inputs import DecoderInputs
from kdloss._inputs import by_name, of_decoder, of_student, of_tokens, refuse_other_order
from kdloss._masks import Padding, all_masks
from kdloss._packing import Packing
from kdloss._passes import Passes, brought, requests
from kdloss._towers import Towers
from kdloss.adapter import evaluating, is_encoder_decoder, resharded
from kdloss.bases import Own, owner
from kdloss.reduction import on_cpu
from kdloss.targets.kinds import KINDS
from kdloss.teacher import Teacher, moved, tensors
from kdloss.terms import Plan
from kdloss.terms._outputs import logits_read
from kdloss.terms._placed import refuse_misplaced

_TOKENS = {"input_ids", "decoder_input_ids"}
_OTHERS = "its criterion may want them"


@dataclass(frozen=True)
class Batch:
    """A step's batch: positional and keyword inputs, and labels, or labels that are shifted already."""

    args: tuple[Any, ...]
    inputs: Mapping[str, Any]
    labels: Any
    shift_labels: Tensor | None = None


class Runner:
    """Runs the models, and remembers what the first pass of each showed."""

    def __init__(self, teachers: Sequence[Teacher | None], plans: bool) -> None:
        self.teachers, self._plans = teachers, plans
        self._pass, self._towers, self._decoder_inputs, self._classes = Passes(), Towers(), DecoderInputs(), Named()
        self._packing = Packing()
        self._seen: set[int] = set()  # the stored teachers whose rows were compared with a mask
        self._compared: set[int] = set()  # the teachers whose weights were compared with the student's
        self._ordered: set[tuple[int, int]] = set()  # teachers, and how many inputs by position both read alike
        self._student: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_student": None, "_compared": set(), "_ordered": set()}

    def study(self, student: nn.Module, plan: Plan, batch: Batch, own_loss: bool) -> Captured:
        """The student's pass; it gets the labels if its own loss is read."""
        own = of_student(student, self.teachers, batch.inputs)
        self._packing.check(student, student, batch.args, own, "student")
        inputs = self._decoder_inputs.of(student, batch.args, own, batch.labels)
        if own_loss:
            given = {"labels": batch.labels, "shift_labels": batch.shift_labels}
            inputs |= {name: x for name, x in given.items() if x is not None}
        why = plan.why_full if self._plans else _OTHERS
        return self._pass(student, requests(plan.reads, "student"), batch.args, inputs, why_full=why)

    def outputs(self, student: nn.Module, plan: Plan, batch: Batch, stored: Sequence[Any] = ()) -> Iterator[Any]:
        """Each teacher's output, computed when it is asked for; None for a teacher that no term reads."""
        rest = iter(stored)
        for k, teacher in enumerate(self.teachers):
            if teacher is None:
                output = _on_students_device(student, next(rest, None))
                if output is None and self._plans and plan.of_teacher(k):
                    raise TypeError(
                        f"teacher {k} is stored (given as None), and this call has no outputs of it: pass them, "
                        "model(**batch, teacher=logits), a list for several stored teachers, or give a model as the "
                        "teacher, Distillation(student, teacher, criterion)"
                    )
                self._refuse_misplaced(k, student, batch, output)
                yield self._classes.stored(k, student, output) if self._plans else output
            elif not self._plans or plan.of_teacher(k):
                # Popped from a list, so that only the caller holds the output.
                with self._refuse_own_weights(k, student):
                    seen = [self._teach(k, teacher, student, plan, batch)]
                home = None if teacher.device is None else next((p.device for p in student.parameters()), None)
                yield brought(seen.pop(), home)
            else:
                yield None

    def masks(
        self,
        student: nn.Module,
        seen: Captured,
        plan: Plan,
        batch: Batch,
        mask: Tensor | None,
        feature_mask: Any,
        *,
        causal: bool,
        own_loss: bool,
    ) -> dict[str, Any]:
        """The masks for the criterion, from the user's masks and the batch's own."""
        on_features = [name for name, r in plan.reads.items() if r.pairs]
        inputs = by_name(student, batch.args, batch.inputs)
        said = mask, feature_mask, *map(inputs.get, ("attention_mask", "decoder_attention_mask"))
        if all(x is None for x in said) and not (on_features and is_encoder_decoder(student)):
            return {"mask": None}  # all features count, at the labels' positions if there are as many
        padding = Padding.of(student, inputs)
        again = partial(self.study, student, plan, batch, own_loss)
        place = self._towers.of(student, requests(plan.reads, "student"), inputs, self._pass.located, again)
        logits = logits_read(seen.output, [reads.logits_at for reads in plan.reads.values()])
        shape = None if logits is None else logits.shape if plan.layout is None else plan.layout.shape(logits.shape)
        labels = batch.labels if batch.shift_labels is None else batch.shift_labels
        return all_masks(padding, shape, on_features, labels, mask, feature_mask, place, causal=causal)

    def _refuse_misplaced(self, k: int, student: nn.Module, batch: Batch, output: Any) -> None:
        """Raise if a stored teacher's rows don't stand at the batch's tokens; on an accelerator only the first time."""
        mask = None if output is None else Padding.of(student, by_name(student, batch.args, batch.inputs)).outputs
        if mask is not None:
            refuse_misplaced(output, mask, always=k not in self._seen)
            self._seen.add(k)

    def _refuse_own_weights(self, k: int, student: nn.Module) -> AbstractContextManager[None]:
        """Raise if teacher k runs, inside the `with`, on weights that the student trains; once per student."""
        if self._student is None or self._student() is not student:
            self._student, self._compared, self._ordered = weakref.ref(student), set(), set()
        teacher = self.teachers[k]
        module = None if teacher is None or k in self._compared else owner(teacher.module)
        return nullcontext() if module is None else self._watched(k, Own(student, module))

    @contextmanager
    def _watched(self, k: int, own: Own) -> Iterator[None]:
        with own.watch():
            yield
        own.refuse(k)
        self._compared.add(k)

    def _teach(self, k: int, teacher: Teacher, student: nn.Module, plan: Plan, batch: Batch) -> Captured:
        reads, module = {name: plan.reads[name] for name in plan.of_teacher(k)}, teacher.module
        args, inputs, labels = batch.args, dict(batch.inputs), batch.labels
        if teacher.inputs is None and (k, len(args)) not in self._ordered:
            refuse_other_order(student, module, args)
            self._ordered.add((k, len(args)))
        rename = next((r.to_teacher for r in reads.values() if r.to_teacher is not None), None)
        if rename is not None and teacher.inputs is None:
            own = partial(_renamed, module, rename, by_name(student, args, inputs))
            inputs = {name: own(x, name) for name, x in inputs.items()}
            places = zip_longest(args, by_name(student, args, {}), by_name(module, args, {}))
            args = tuple(own(*place) for place in places)
            labels = of_decoder(module, labels, rename)
        args, inputs = teacher.of(args, inputs)
        if teacher.inputs is None:
            self._packing.check(teacher, module, args, inputs, "teacher")
        stop = self._plans and plan.ends_early(k)
        why = plan.why_teacher_whole(k) if self._plans else _OTHERS
        with torch.no_grad():
            if not isinstance(module, nn.Module):
                seen = Captured()
                seen.output = module(*args, **inputs)
            else:
                inputs = self._decoder_inputs.of(module, args, inputs, labels)
                with evaluating(module):
                    asked = requests(reads, "teacher")
                    seen = self._pass(module, asked, args, inputs, stop=stop, why_full=why)
                resharded(module)
        seen.output = tensors(seen.output, (args, inputs))
        if not stop:  # a pass for features only has no classes
            seen.classes = self._classes(k, student, module)
        return seen


def _renamed(
    teacher: Callable[..., Any],
    rename: Callable[[Tensor], Tensor],
    given: Mapping[str, Any],
    x: Any,
    *names: str | None,
) -> Any:
    """An input in the teacher's ids, if one of its names says that it holds tokens; `given` has their masks."""
    name = next((name for name in names if name in _TOKENS), None)
    if x is None or name is None:
        return x
    return of_tokens(teacher, x, given.get(name.replace("input_ids", "attention_mask")), rename)


def _on_students_device(student: nn.Module, output: Any) -> Any:
    """A stored teacher's output, moved to the student's device if it is on the host."""
    if isinstance(output, KINDS) and on_cpu(output.device):
        home = next((p.device for p in student.parameters()), output.device)
        if not on_cpu(home) and home.type != "meta":
            return moved(output, home)
    return output
