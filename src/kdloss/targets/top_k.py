"""A teacher's most probable classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Size, Tensor

from kdloss import _checks
from kdloss.reduction import fill
from kdloss.targets import _ids, _served, few_classes, looks
from kdloss.targets._most_probable import most_probable

Tail = Literal["bucket", "renormalise", "uniform"]
TAILS = ("bucket", "renormalise", "uniform")


@dataclass(frozen=True, eq=False)
class TopKLogits:
    r"""A teacher's k most probable classes at every position, with their log-probabilities.

    `tail` says how the other classes, of mass $1 - \sum_i p_i$, are treated:

    - "bucket": as one more class, compared with the student's mass on all classes that were not kept. The
      divergence of these k + 1 classes is never negative, 0 where student is teacher, and for f-divergences
      (the KL family) never more than the dense one.
    - "renormalise": not at all; both sides are renormalised over the k classes, and the student's other logits get no
      gradient.
    - "uniform": their mass is spread evenly over them. This needs all of the student's logits.

    With all V classes kept, each equals the dense teacher. Divergences that need every class in its place (by labels,
    costs or correlations) take "uniform" alone; those of logits (`logit_mse`, `bernoulli_kl`, a teacher's own
    temperature) and `uld` take no top-k teacher. `temperature` is the temperature of the
    log-probabilities. A loss at another T softens from there, and the bucket as one class, so keep them at the
    temperature you train with. `log_rest` is the log-probability of all other classes together, where you know it
    more precisely than as 1 minus the sum. `vocabulary` is the number V of classes, against which ids are checked.
    `classes` are the names of the classes, by which `kdloss.Distiller` finds them among the student's.

    In a row without any class, loss and gradient are 0, whatever the tail.

    Numbers keep the types in which you give them, also on the way to a device, and become int64 and float32 where they
    are used: a row of 64 classes in uint16 and float16 is 258 bytes, in int64 and float32 772.

    Shapes: indices `[..., k]` of any integer type, distinct in each row, with -1 for an empty slot, or the largest
    number of an unsigned type where that is no class of the `vocabulary`; log_probs `[..., k]`; log_rest `[...]`.

    Raises: ValueError for shapes or devices that differ or an unknown tail, and for impossible numbers: a class
    twice in a row or out of range, probabilities or raw logits in place of log-probabilities. CPU tensors are checked
    when they are given, except rows of padding (one id and one number everywhere), which a loss checks if they count
    (those that `mask` or the labels leave; without either, all).
    Tensors on an accelerator are checked under a criterion's `check_finite=True`. TypeError for indices that are no
    integers.

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
        looks.look_at_first(self)

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "*batch vocab"],
        k: int,
        *,
        tail: Tail = "bucket",
        temperature: float = 1.0,
    ) -> "TopKLogits":
        """Keep the k most probable classes of these logits at this temperature; `tail` is as in the class."""
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
        """Read what vLLM or SGLang return for a text, or a batch of texts: one row per token, None for the first.

        A row is a mapping from token ids to log-probabilities, as numbers or as objects or dicts that have a
        `logprob` (vLLM's `prompt_logprobs`, also as JSON), or a list of tuples that begin with log-probability and
        id (SGLang's `input_top_logprobs`). Rows may differ in length, since servers add the actual token to the k most
        probable ones; an id that is listed twice is kept once. Shorter rows and texts are padded with empty slots at
        the right.

        - `of`: "tokens" where row t predicts token t, as in both servers. Row t is moved to position t - 1, whose
          logits predict that token, and the last position is empty: right for a criterion with
          `causal=True`. "logits" leaves row t at position t.
        - `tail` and `vocabulary` are as in the class; `temperature` is that of the server's log-probabilities.
        - `device`: the device of the result.

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
        indices, log_probs = _served.from_rows(rows, of == "tokens")
        return cls(indices.to(device), log_probs.to(device), tail, temperature, None, vocabulary)

    @property
    def shape(self) -> Size:
        """The shape of the kept classes, `[..., k]`."""
        return self.indices.shape

    @property
    def device(self) -> torch.device:
        """The device of the numbers."""
        return self.indices.device

    def at(self, pick: Callable[[Tensor], Tensor]) -> "TopKLogits":
        """The rows at chosen positions."""
        rest = None if self.log_rest is None else pick(self.log_rest)
        return self._with(indices=_ids.picked(self.indices, pick), log_probs=pick(self.log_probs), log_rest=rest)

    def only(self, mask: Bool[Tensor, "..."]) -> "TopKLogits":
        """The same rows, without any class where `mask` is False."""
        rest = None if self.log_rest is None else fill(self.log_rest, mask)
        return self._with(indices=fill(self.ids() + 1, mask) - 1, log_probs=fill(self.log_probs, mask), log_rest=rest)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "TopKLogits":
        """Copy to a `device`, in the same types; `non_blocking` is as for a tensor in pinned memory."""
        return self.at(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TopKLogits":
        """Copy to pinned memory; `DataLoader(pin_memory=True)` calls this for each item of a batch."""
        return self.at(Tensor.pin_memory)

    def detach(self) -> "TopKLogits":
        """The same rows, detached."""
        if not any(x is not None and x.requires_grad for x in (self.log_probs, self.log_rest)):
            return self
        rest = None if self.log_rest is None else self.log_rest.detach()
        return self._with(log_probs=self.log_probs.detach(), log_rest=rest)

    def ids(self) -> Tensor:
        """The indices as int64, -1 in an empty slot."""
        return _ids.of(self.indices, self.vocabulary)

    def empty(self) -> Tensor:
        """Which rows have no class, `[...]`."""
        return self.ids().amax(-1) < 0

    def _with(self, **changes: Any) -> "TopKLogits":
        """The same rows, or some of them, without checking the numbers again."""
        return _made([changes[name] if name in changes else getattr(self, name, False) for name in _NAMES])

    def renamed(self, new: Int[Tensor, " old"], vocabulary: int) -> "TopKLogits":
        """The same classes under other indices, `new[old]`; those with a new index of -1 are dropped."""
        indices = self.ids()
        indices = new[indices.clamp_min(0)].where(indices >= 0, -1)
        return self._with(indices=indices, log_rest=few_classes.rest_of(self), vocabulary=vocabulary, classes=None)

    def against(self, student: Float[Tensor, "*batch vocab"]) -> tuple[Tensor, Tensor]:
        """Logits of both over the same classes: the k kept ones, and the rest as `tail` treats it."""
        return few_classes.against(self, student)


def right_rows(
    indices: Tensor,
    log_probs: Tensor,
    tail: Tail,
    temperature: float,
    log_rest: Tensor | None,
    vocabulary: int | None,
    classes: tuple[str, ...] | None = None,
) -> TopKLogits:
    """`TopKLogits` of rows that the library itself computed, without checking their numbers."""
    _checks.choice("tail", tail, TAILS)
    return _made([indices, log_probs, tail, temperature, log_rest, vocabulary, classes, True])


_NAMES = (*TopKLogits.__dataclass_fields__, "_right")  # the last one says that all rows were checked


def _made(values: Sequence[Any]) -> TopKLogits:
    made = object.__new__(TopKLogits)
    for name, value in zip(_NAMES, values, strict=True):
        object.__setattr__(made, name, value)  # torch 2.11 compiles this, but not a copy of vars(self)
    return made
