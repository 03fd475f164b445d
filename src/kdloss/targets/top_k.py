"""A teacher of which only the most probable classes were kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Integer
from torch import Size, Tensor

from kdloss import _checks
from kdloss.reduction import alike, precise
from kdloss.targets import _stored
from kdloss.targets._most_probable import most_probable

Tail = Literal["bucket", "renormalise", "uniform"]
TAILS = ("bucket", "renormalise", "uniform")
_LARGEST = {torch.uint8: 2**8 - 1, torch.uint16: 2**16 - 1, torch.uint32: 2**32 - 1}
_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}  # in as many bits


@dataclass(frozen=True, eq=False)
class TopKLogits:
    r"""A teacher's k most probable classes at every position, with their log-probabilities.

    What was left out, of mass $1 - \sum_i p_i$, is treated as `tail` says:

    - "bucket": one more class, held against all the student gives to the classes left out. The
      divergence of these k + 1 classes is never negative, 0 where student is teacher, and for f-divergences
      (the KL family) never more than the dense one.
    - "renormalise": the k classes are all there is, on both sides; the student's others get no gradient.
    - "uniform": spread evenly over the classes left out. The student's vocabulary is needed in full.

    With all V classes kept each equals the dense teacher. `temperature` is the one the log-probabilities
    were taken at; a loss at another T softens from there, the bucket as one class, so keep them at the
    temperature you train with. `log_rest` is the log-probability of all that was left out, where it is
    known better than as 1 minus the sum; `vocabulary` the number V of classes, where it shall be checked; `classes` are
    their names, by which `kdloss.Distiller` finds them among the student's.

    A row without any class says nothing: loss and gradient are 0 there, under each tail.

    Numbers stay in the types they are given in, on the way to a device, too, and become int64 and float32 where they
    are used: a row of 64 classes in uint16 and float16 is 258 bytes, in int64 and float32 772.

    Shapes: indices `[..., k]` of any integer type, different ones in each row, -1 for an empty slot, or the largest
    number of an unsigned type where that is no class of the `vocabulary`; log_probs `[..., k]`; log_rest `[...]`.

    Raises: ValueError for shapes or devices that differ or an unknown tail, and for numbers that can't be: a class
    twice in a row or out of range, probabilities or raw logits in place of log-probabilities. CPU tensors are looked
    at when they are given, rows of padding (one id and one number everywhere) in a loss, where they count; those of
    an accelerator under a criterion's `check_finite=True`. TypeError for indices that are no integers.

    >>> import kdloss
    >>> teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    >>> kept = TopKLogits.of(teacher, k=2)
    >>> kept.indices, kdloss.divergences.forward_kl(teacher, kept).abs() < 1e-6
    (tensor([[0, 1]]), tensor([True]))
    """

    indices: Integer[Tensor, "*batch k"]
    log_probs: Float[Tensor, "*batch k"]
    tail: Tail = "bucket"
    temperature: float = 1.0
    log_rest: Float[Tensor, "*batch"] | None = None
    vocabulary: int | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _checks.choice("tail", self.tail, TAILS)
        _checks.temperature(self.temperature)
        _checks.floating("log_probs", self.log_probs)
        if self.indices.is_floating_point() or self.indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {self.indices.dtype}; write indices.long()")
        if self.indices.shape != self.log_probs.shape or not self.indices.ndim or not self.indices.shape[-1]:
            raise ValueError(
                f"indices {tuple(self.indices.shape)} and log_probs {tuple(self.log_probs.shape)} must "
                "both be [..., k], with k of 1 or more"
            )
        if self.log_rest is not None and self.log_rest.shape != self.indices.shape[:-1]:
            raise ValueError(
                f"log_rest has shape {tuple(self.log_rest.shape)}, indices {tuple(self.indices.shape)}; "
                "it is one number per position"
            )
        _checks.same_place("log_probs", self.indices, self.log_probs)
        if _stored.free_to_look(self.indices, self.log_probs, self.log_rest):
            ids = self.ids()
            padding = _stored.padding(ids, self.log_probs)
            _stored.look(ids, self.log_probs, self.log_rest, self.vocabulary, ~padding)
            object.__setattr__(self, "_right", not padding.any().item())

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "*batch vocab"],
        k: int,
        *,
        tail: Tail = "bucket",
        temperature: float = 1.0,
    ) -> "TopKLogits":
        """The k most probable classes of these logits at this temperature; `tail` is the class's."""
        vocab = logits.shape[-1]
        if not 1 <= k <= vocab:
            raise ValueError(f"k={k} of {vocab} classes; k lies between 1 and their number")
        temperature = _checks.temperature(temperature)
        indices, log_probs, log_rest = most_probable(logits.detach(), k, temperature)
        return right_rows(indices, log_probs, tail, temperature, log_rest, vocab)

    @classmethod
    def from_served(
        cls,
        rows: Sequence[Any],
        *,
        of: Literal["tokens", "logits"] = "tokens",
        tail: Tail = "bucket",
        temperature: float = 1.0,
        vocabulary: int | None = None,
        device: torch.device | str | None = None,
    ) -> "TopKLogits":
        """What vLLM or SGLang say of a text, or of a batch of texts: one row for each token, None for the first.

        A row is a mapping from token ids to log-probabilities, as numbers or as objects or dicts that have a
        `logprob` (vLLM's `prompt_logprobs`, also as JSON), or a list of tuples that begin with log-probability and
        id (SGLang's `input_top_logprobs`). Rows may be of different lengths, as the token that was there stands
        beside the k most probable; an id that stands twice is kept once. Shorter rows and texts are filled up with
        empty slots at the right.

        - `of`: "tokens" where row t says what token t was expected to be, as both servers have it. It comes to stand
          at t - 1, whose logits predict that token, and the last position is empty: right for a criterion with
          `causal=True`. "logits" leaves row t at t.
        - `tail` and `vocabulary` are the class's; `temperature` is that of the server's log-probabilities.
        - `device`: where the rows are put.

        Shapes: `[T, k]` for a text of T rows, `[B, T, k]` for a batch.

        Raises: ValueError where `of="tokens"` and there is a row for the first token; TypeError for rows of
        another form.

        >>> rows = [None, {7: -0.5, 2: -1.5}, {2: -0.1}]
        >>> kept = TopKLogits.from_served(rows)
        >>> kept.indices
        tensor([[ 7,  2],
                [ 2, -1],
                [-1, -1]])
        """
        _checks.choice("of", of, ("tokens", "logits"))
        indices, log_probs = _stored.from_rows(rows, of == "tokens")
        return cls(indices.to(device), log_probs.to(device), tail, temperature, None, vocabulary)

    @property
    def shape(self) -> Size:
        """The shape of what was kept, `[..., k]`."""
        return self.indices.shape

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.indices.device

    def at(self, pick: Callable[[Tensor], Tensor]) -> "TopKLogits":
        """Chosen positions."""
        rest = None if self.log_rest is None else pick(self.log_rest)
        dtype = self.indices.dtype
        signed = _UNSIGNED.get(dtype)  # older torch picks from no others
        indices = pick(self.indices) if signed is None else pick(self.indices.view(signed)).view(dtype)
        return self._with(indices=indices, log_probs=pick(self.log_probs), log_rest=rest)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "TopKLogits":
        """On a `device`, in the same types; `non_blocking` as for a tensor, from pinned memory."""
        return self.at(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TopKLogits":
        """In pinned memory, as `DataLoader(pin_memory=True)` asks of what is in a batch."""
        return self.at(Tensor.pin_memory)

    def detach(self) -> "TopKLogits":
        """Without gradients."""
        rest = None if self.log_rest is None else self.log_rest.detach()
        return self._with(log_probs=self.log_probs.detach(), log_rest=rest)

    def look(self, classes: int | None, keep: Tensor | None = None, *, always: bool = False) -> None:
        """Raise for numbers that can't be in a row that counts, where looking costs nothing or `always`."""
        if self._looked_at(classes) or not (always or _stored.free_to_look(self.indices, self.log_probs, keep)):
            return
        keep = torch.ones_like(self.log_probs[..., 0], dtype=torch.bool) if keep is None else keep
        if getattr(self, "_right", False):
            _stored.look_at_range(self.ids(), classes, keep)
        else:
            _stored.look(self.ids(), self.log_probs, self.log_rest, classes, keep)

    def look_at_range(self, classes: int) -> None:
        """The same where nobody says which rows count: padding doesn't."""
        if self._looked_at(classes) or not _stored.free_to_look(self.indices, self.log_probs):
            return
        if not _stored.in_range(ids := self.ids(), classes):
            _stored.look_at_range(ids, classes, ~_stored.padding(ids, self.log_probs))

    def _looked_at(self, classes: int | None) -> bool:
        """Whether all rows are known to be right among so many classes."""
        known = self.vocabulary
        return getattr(self, "_right", False) and (classes is None or (known is not None and known <= classes))

    def ids(self) -> Tensor:
        """The indices as int64, -1 in an empty slot."""
        ids, largest = self.indices.long(), _LARGEST.get(self.indices.dtype)
        if largest is None or self.vocabulary is None or self.vocabulary > largest:
            return ids
        return ids.masked_fill(ids == largest, -1)

    def empty(self) -> Tensor:
        """Which rows say nothing, `[...]`."""
        return self.ids().amax(-1) < 0

    def _with(self, **changes: Any) -> "TopKLogits":
        """The same rows, or some of them: what was looked at isn't looked at again."""
        other = object.__new__(type(self))
        vars(other).update(vars(self) | changes)
        return other

    def renamed(self, new: Int[Tensor, " old"], vocabulary: int) -> "TopKLogits":
        """The same classes under other indices, `new[old]`; those with a new index of -1 are gone."""
        indices = self.ids()
        indices = new[indices.clamp_min(0)].where(indices >= 0, -1)
        return self._with(indices=indices, log_rest=self._rest(), vocabulary=vocabulary, classes=None)

    def against(self, student: Float[Tensor, "*batch vocab"]) -> tuple[Tensor, Tensor]:
        """Logits of both over the same classes: the k, and what the tail makes of the rest."""
        student, _ = alike(student, self.log_probs)
        vocab, t = student.shape[-1], self.temperature
        indices, empty = self.slots()
        nothing = empty.all(-1, keepdim=True)
        student = student.masked_fill(nothing, 0)
        if self.tail == "uniform":
            return student, self._spread(indices, empty, vocab).masked_fill(nothing, 0).expand(student.shape)
        kept = student.gather(-1, indices).masked_fill(empty & ~nothing, -torch.inf)
        if self.tail == "renormalise":
            return kept - base(kept), self.logits(empty, vocab)
        # Relative to the largest of their own: beside the classes kept, the others may be too small for a number.
        others = student.scatter(-1, indices, -torch.inf)
        largest = others.detach().amax(-1, keepdim=True)
        low, top = base(kept, largest), largest.masked_fill(largest == -torch.inf, 0)
        mass = ((others - top) / t).exp().sum(-1, keepdim=True)
        return torch.cat([kept - low, log_mass(mass) * t + (top - low)], -1), self.logits(empty, vocab)

    def slots(self) -> tuple[Tensor, Tensor]:
        """Indices as int64, an empty slot repeating a full one, and which slots are empty."""
        indices = self.ids()
        empty = indices < 0
        full = indices.amax(-1, keepdim=True).clamp_min(0)
        return indices.where(~empty, full), empty

    def logits(self, empty: Tensor, vocab: int) -> Tensor:
        """The teacher's logits of the k classes, and of the bucket if there is one."""
        kept = precise(self.log_probs).masked_fill(empty, -torch.inf)
        if self.tail == "bucket":
            everything = (~empty).sum(-1) == vocab
            kept = torch.cat([kept, self._rest().masked_fill(everything, -torch.inf).unsqueeze(-1)], -1)
        return (kept * self.temperature).masked_fill(empty.all(-1, keepdim=True), 0)

    def _spread(self, indices: Tensor, empty: Tensor, vocab: int) -> Tensor:
        log_probs, rest = alike(self.log_probs, self._rest())
        left = (vocab - (~empty).sum(-1)).clamp_min(1).to(log_probs.dtype).log()
        repeated = log_probs.gather(-1, self.ids().argmax(-1, keepdim=True))
        spread = (rest - left).unsqueeze(-1).repeat_interleave(vocab, -1)
        return spread.scatter(-1, indices, log_probs.where(~empty, repeated)) * self.temperature

    def _rest(self) -> Tensor:
        """The log-probability of all that was left out; never 0, where it has to be made from roundings."""
        if self.log_rest is not None:
            return precise(self.log_rest)
        log_probs = precise(self.log_probs).masked_fill(self.ids() < 0, -torch.inf)
        return (1 - log_probs.exp().sum(-1)).clamp_min(torch.finfo(log_probs.dtype).eps).log()


def right_rows(
    indices: Tensor,
    log_probs: Tensor,
    tail: Tail,
    temperature: float,
    log_rest: Tensor,
    vocabulary: int,
    classes: tuple[str, ...] | None = None,
) -> TopKLogits:
    """Rows that can't be wrong, as they were made here, and aren't looked at."""
    _checks.choice("tail", tail, TAILS)
    made = object.__new__(TopKLogits)
    fields = (indices, log_probs, tail, temperature, log_rest, vocabulary, classes)
    vars(made).update(zip(TopKLogits.__dataclass_fields__, fields, strict=True), _right=True)
    return made


def log_mass(mass: Tensor) -> Tensor:
    """log(mass), with -inf and no gradient where there is no mass."""
    none = mass == 0
    return mass.masked_fill(none, 1).log().masked_fill(none, -torch.inf)


def base(*logits: Tensor) -> Tensor:
    """The largest of some logits at every position, `[..., 1]`, 0 where none is finite: what logits are taken
    relative to, so that small numbers are rounded, not large ones.
    """
    largest = torch.cat([x.detach().amax(-1, keepdim=True) for x in logits], -1).amax(-1, keepdim=True)
    return largest.masked_fill(largest == -torch.inf, 0)
