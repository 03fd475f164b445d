"""Sections on hidden states and heads, for which the full logits never exist."""

from collections.abc import Callable, Iterator
from typing import Any

import liger
import recipes
import torch
from measure import Row, Step, backward, engine_as, leaves, multiplies_bf16, peak, peak_row, time_row
from sections.given import lazy, shape, short
from torch import Tensor

import kdloss
from kdloss import VanillaKD, divergences

T = recipes.T
BOTH, KL = VanillaKD(T, 0.5), VanillaKD(T, 0.0)


def dense(recipe: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a recipe on logits into one on hidden states and heads."""
    return lambda student, teacher, *rest: recipe(student.dense(), teacher.dense(), *rest)


def products(student: Any, teacher: Any) -> Step:
    """The four matrix products that every way to compute the loss needs."""
    hidden, weight, teacher_hidden, teacher_weight = (t.detach() for t in leaves((student, teacher)))

    def step() -> None:
        z, _ = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        z @ weight, z.T @ hidden

    return step


def against_products(
    memory: str, tokens: int = 256, vocab: int = 32_000, width: int = 512, teacher_width: int = 1024
) -> Iterator[Row]:
    """KL + CE, fp32 and, where the CPU multiplies it, bf16, against the products alone, the plain recipe, Liger."""
    kinds = [(torch.float32, 1.15, 0.9, None), (torch.bfloat16, 1.1, 0.95, 0.9)]
    for dtype, most, of_liger, of_peak in kinds if multiplies_bf16() else kinds[:1]:
        data = lazy(tokens, vocab, width, teacher_width, dtype)
        for compiled in (True, False):
            with engine_as(compiled) as how:
                step, peer = backward(BOTH, *data), liger.fused_linear(0.0, 0.5, T, T**2, min(tokens, 256))
                said = (
                    f"{tokens} tokens, D = {width} and {teacher_width}, V = {shape(vocab)}, {short(dtype)}, {how}, "
                    f"memory {memory}, against"
                )
                yield time_row("lazy KL + CE", f"{said} the four products", step, products(*data[:2]), most)
                if memory == "fresh":
                    plain = backward(dense(recipes.kl_ce), *data)
                    yield time_row("lazy KL + CE", f"{said} the plain recipe", step, plain)
                    yield peak_row("lazy KL + CE", f"{said} the plain recipe", step, plain)
                if peer is not None:
                    theirs = backward(peer, *data)
                    yield time_row("lazy KL + CE", f"{said} Liger, compiled", step, theirs, of_liger)
                    if memory == "fresh":
                        yield peak_row("lazy KL + CE", f"{said} Liger, compiled", step, theirs, of_peak)


def lengths(
    memory: str, lengths: tuple[int, ...] = (512, 2048), vocab: int = 128_256, width: int = 64
) -> Iterator[Row]:
    """Memory does not grow with the number of tokens."""
    said = f"lazy, D = {width}, V = {shape(vocab)}, fp32, uncompiled, memory {memory}"
    few, many = (lazy(n, vocab, width, width) for n in lengths)
    steps = backward(KL, *few), backward(KL, *many)
    plain = peak(backward(dense(recipes.kl), *few))
    yield peak_row(f"KL, {lengths[0]} tokens", f"{said}, against the plain recipe", steps[0], plain, 0.1)
    yield peak_row(f"KL, {lengths[1]} tokens", f"{said}, against {lengths[0]} of ours", steps[1], peak(steps[0]), 1.03)


def what_comes_with_it(
    memory: str, tokens: int = 512, vocab: int = 32_000, width: int = 512, teacher_width: int = 1024
) -> Iterator[Row]:
    """A second divergence from the same teacher, and half of the tokens ignored."""
    said = (
        f"{tokens} tokens, lazy, D = {width} and {teacher_width}, V = {shape(vocab)}, fp32, uncompiled, "
        f"memory {memory}, against KL + CE of ours"
    )
    data = lazy(tokens, vocab, width, teacher_width)
    one = backward(BOTH, *data)
    second = 0.5 * kdloss.Logits(divergences.reverse_kl, name="second")
    yield time_row("KL + CE + reverse KL", said, backward(BOTH + second, *data), one)
    half = data[2].clone()
    half[::2] = -100
    yield time_row("KL + CE, half ignored", said, backward(BOTH, *data[:2], half), one, 0.6)


def teachers(
    memory: str, tokens: int = 256, vocab: int = 32_000, width: int = 64, many: tuple[int, ...] = (2, 4)
) -> Iterator[Row]:
    """The memory of several lazy teachers against one."""
    student, _, labels = lazy(tokens, vocab, width, width)
    group = [lazy(tokens, vocab, width, width)[1] for _ in range(max(many))]
    group = [kdloss.LazyLogits(t.hidden.detach(), t.weight.detach()) for t in group]
    one = peak(backward(BOTH, student, group[0], labels))
    for n in many:
        step = backward(BOTH, student, kdloss.Mixture(group[:n]), labels)
        said = f"{tokens} tokens, D = {width}, V = {shape(vocab)}, fp32, uncompiled, against one teacher"
        yield peak_row(f"KL + CE, {n} lazy teachers", said, step, one, 1.1)
