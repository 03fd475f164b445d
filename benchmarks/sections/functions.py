"""Sections: functions on tensors, stored teachers, different vocabularies, feature distances."""

from collections.abc import Callable, Iterator

import recipes
import torch
from measure import Row, backward, engine_as, peak_row, time_row
from sections.given import logits, shape

from kdloss import TokenMap, TopKLogits, VanillaKD, distances, divergences, truncate

T = recipes.T
Distance = Callable[..., torch.Tensor]


def dense(memory: str, tokens: int = 64, vocab: int = 32_000) -> Iterator[Row]:
    """A divergence called on two tensors."""
    data = logits(tokens, vocab)[:2]

    def ours(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return divergences.forward_kl(student, teacher, temperature=T).mean()

    said = f"{shape(tokens, vocab)} fp32, memory {memory}, against the plain recipe"
    steps = backward(ours, *data), backward(recipes.kl, *data)
    yield time_row("`forward_kl` on tensors", said, *steps, 0.8)
    if memory == "fresh":
        yield peak_row("`forward_kl` on tensors", said, *steps, 0.6)


def top_k(
    memory: str, shapes: tuple[tuple[int, int], ...] = ((64, 32_000), (64, 128_256)), k: int = 64
) -> Iterator[Row]:
    """A teacher's top-k classes with a bucket for the rest, against recipes without the rest."""
    for tokens, vocab in shapes:
        student, teacher, _ = logits(tokens, vocab)
        kept = TopKLogits.of(teacher, k)
        stored = kept.indices, kept.log_probs
        for compiled in (True, False):
            with engine_as(compiled) as how:
                said = f"{shape(tokens, vocab)} fp32, {how}, memory {memory}, against"
                step = backward(VanillaKD(1.0, 0.0), student, kept)
                for recipe, by in ((recipes.gathered, "gathering"), (recipes.sparse, "DistillKit's formula")):
                    other = backward(torch.compile(recipe) if compiled else recipe, student, *stored)
                    goal = 0.9 if recipe is recipes.gathered and not compiled else None
                    yield time_row(f"KL of the top {k}", f"{said} {by}, {how}", step, other, goal)
                    if memory == "fresh":
                        yield peak_row(f"KL of the top {k}", f"{said} {by}, {how}", step, other)


def vocabularies(memory: str, tokens: int = 64, vocab: int = 16_000, more: int = 128) -> Iterator[Row]:
    """Teachers with another vocabulary: the first classes are shared, or some classes by their ids."""
    student, _, labels = logits(tokens, vocab)
    teacher = 3 * torch.randn(tokens, vocab + more)
    ids = torch.randperm(vocab)[: vocab - more], torch.randperm(vocab + more)[: vocab - more]
    cases = {
        "`truncate`": (truncate, recipes.truncated, ()),
        "`TokenMap`": (TokenMap(*ids), recipes.mapped, ids),
    }
    for name, (vocabulary, recipe, extra) in cases.items():
        for compiled in (True, False):
            with engine_as(compiled) as how:
                ours = backward(VanillaKD(T, 0.5, vocabulary=vocabulary), student, teacher, labels)
                by_hand = torch.compile(recipe) if compiled else recipe
                steps = ours, backward(by_hand, student, teacher, labels, *extra)
                said = f"{shape(tokens, vocab)} fp32, {how}, memory {memory}, against {how} torch by hand"
                yield time_row(f"KL + CE, {name}", said, *steps, None if compiled else 0.8)
                if memory == "fresh":
                    yield peak_row(f"KL + CE, {name}", said, *steps)


def features(memory: str, rows: int = 128, width: int = 512, batch: int = 16, side: int = 14) -> Iterator[Row]:
    """Feature distances against the obvious version."""
    import obvious

    maps, tokens = (batch, width // 2, side, side), distances.tokens

    def between(distance: Distance) -> tuple[Distance, Distance]:
        ours, other = distances.between_examples(distance), getattr(obvious, distance.__name__)
        return lambda s, t: ours(tokens(s), tokens(t)), lambda s, t: other(s.flatten(1), t.flatten(1))

    def of_maps(distance: Distance) -> tuple[Distance, Distance]:
        return lambda s, t: distance(tokens(s), tokens(t)), getattr(obvious, distance.__name__)

    cases = (
        ("`rkd_distance`", (distances.rkd_distance, obvious.rkd_distance), (rows, width)),
        ("`cwd`", of_maps(distances.cwd), maps),
        ("`similarity` between examples", between(distances.similarity), maps),
        ("`cka` between examples", between(distances.cka), maps),
        ("`mse`", of_maps(distances.mse), maps),
        ("`mse`", (distances.mse, obvious.mse), (8, rows, width + width // 2)),
    )
    for name, (distance, other), sizes in cases:
        student, teacher = torch.randn(2, *sizes)
        student = student.clone().requires_grad_()
        steps = [backward(lambda s, t, d=d: d(s, t).mean(), student, teacher) for d in (distance, other)]
        said = f"{shape(*sizes)} fp32, memory {memory}, against the obvious version"
        yield time_row(name, said, *steps, 1.1)
        if memory == "fresh":
            yield peak_row(name, said, *steps)
