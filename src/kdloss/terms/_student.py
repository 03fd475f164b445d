"""The student's logits, shared by the terms of one step."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Size, Tensor

from kdloss import _checks
from kdloss._layout import Layout, classes_last
from kdloss.engine import unblockable
from kdloss.engine.task import unwrapped
from kdloss.reduction import precise
from kdloss.targets.kinds import dense
from kdloss.terms._outputs import head_of
from kdloss.terms._positions import Positions
from kdloss.terms.cross_entropy import CrossEntropy
from kdloss.terms.logits import Logits


class StudentLogits:
    """The student's logits, found once for all terms with the same `take`, and checked for each term."""

    def __init__(
        self,
        terms: Iterable[Any],
        student: Any,
        labels: Any,
        known: Sequence[Size],
        layout: Layout | None,
        turned: set[Any],
    ) -> None:
        self.terms = [term for term in terms if isinstance(term, (CrossEntropy, Logits))]
        self.student, self.labels, self.known, self.layout, self.turned = student, labels, known, layout, turned
        self._found: dict[Any, Any] = {}
        self._rows: dict[Any, bool] = {}
        self._there: dict[Any, Tensor] = {}

    def of(self, term: Any) -> Any:
        """The logits that a term reads."""
        if term.take not in self._found:
            given = term.logits(self.student)
            head = head_of(self.student, term.take)
            found = classes_last(given, self.layout, self.known, "student", "layout", head, self.turned)
            self._found[term.take] = found
        return self._found[term.take]

    def taught(self, term: Logits, logits: Any, layout: Layout | None, teacher: Any) -> Any:
        """The logits of a term's teacher, with their classes last; the student's tell the positions."""
        where, head = [self.of(term).shape[:-1]], head_of(teacher, term.teacher_take)
        return classes_last(logits, layout, where, "teacher", "teacher_layout", head, self.turned)

    def checked(self, term: Any, where: Positions) -> Any:
        """The logits that a term reads; raises if they don't stand at its positions, or need several classes."""
        logits = self.of(term)
        if logits.shape[:-1] != where.shape:
            raise ValueError(
                f"the term {term.name!r} reads logits at positions {tuple(logits.shape[:-1])}, and labels, mask or the "
                f"first term's logits stand at {tuple(where.shape)}: terms on logits share one set of positions. To "
                "learn a teacher's predictions at others write kdloss.Features(['head'], pairing='same', "
                "distance=kdloss.divergences.forward_kl), with the name of the head's module: it takes the mean over "
                "the positions of each example. For labels at others write kdloss.Task(function). Or bring the logits "
                "to these positions by take=..., a function of the output"
            )
        if logits.shape[-1:] == (1,):
            if isinstance(term, CrossEntropy) and as_given(term):
                _checks.one_class(term.name, logits, self.labels)
            elif isinstance(term, Logits) and not getattr(unwrapped(term.divergence)[0], "one_class", True):
                _checks.one_class(term.name, logits)
        return logits

    def by_rows(self, term: Any) -> bool:
        """Whether a term can be computed in blocks of rows, together with all others that read the same logits."""
        if not as_given(term):
            return False
        if term.take not in self._rows:
            logits, alike = self.of(term), (t for t in self.terms if t.take == term.take)
            self._rows[term.take] = not any(unblockable(logits, getattr(t, "divergence", None)) for t in alike)
        return self._rows[term.take]

    def there(self, term: Any, where: Positions) -> Tensor:
        """A term's logits at its positions, in float32 or better; shared, so gradients add up before rounding."""
        key = term.take, id(where)
        if key not in self._there:
            self._there[key] = precise(dense(where.take(self.of(term))))
        return self._there[key]


def as_given(term: CrossEntropy | Logits) -> bool:
    """Whether the engine may compute the term: not for a subclass with a `loss` of its own."""
    return type(term).loss in (CrossEntropy.loss, Logits.loss)
