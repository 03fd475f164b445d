"""Sections on logits: the compiled engine against compiled recipes, the uncompiled engine against plain ones."""

from collections.abc import Callable, Iterator
from itertools import product

import recipes
import torch
from measure import Row, anew, backward, engine_as, peak_row, time_row
from sections.given import logits, shape, short
from torch import Tensor

import kdloss
from kdloss import VanillaKD, divergences

T = recipes.T
PAIRS = {
    "KL + CE": (VanillaKD(T, 0.5), recipes.kl_ce),
    "JSD": (VanillaKD(T, 0.0, divergence=divergences.jsd), recipes.jsd),
    "reverse KL": (VanillaKD(T, 0.0, divergence=divergences.reverse_kl), recipes.reverse_kl),
    "TVD": (VanillaKD(T, 0.0, divergence=divergences.total_variation), recipes.total_variation),
}
BY_LOGARITHMS = {
    "KL": (VanillaKD(T, 0.0), recipes.logs_kl),
    "JSD": (PAIRS["JSD"][0], recipes.logs_jsd),
    "TVD": (PAIRS["TVD"][0], recipes.logs_total_variation),
}


def against_recipes(memory: str, shapes: tuple[tuple[int, int], ...] = ((64, 32_000), (128, 128_256))) -> Iterator[Row]:
    """KL + CE, JSD, reverse KL and TVD: time with fresh and with kept memory, peak once."""
    for (tokens, vocab), compiled in product(shapes, (True, False)):
        data = logits(tokens, vocab)
        with engine_as(compiled) as how:
            said = f"{shape(tokens, vocab)} fp32, {how}, memory {memory}"
            for name, (ours, recipe) in PAIRS.items():
                goal = 0.8 if compiled else 0.6 if memory == "kept" else None
                other = torch.compile(recipe) if compiled else recipe
                against = "the compiled recipe" if compiled else "the plain recipe"
                steps = backward(ours, *data), backward(other, *data)
                yield time_row(name, f"{said}, against {against}", *steps, goal)
                if memory == "fresh":
                    yield peak_row(name, f"{said}, against {against}", *steps)
                    if compiled:
                        yield peak_row(name, f"{said}, against one gradient", steps[0], data[0].nbytes, 1.15)
            if memory == "fresh" and compiled:
                spare = [data[0].detach().clone().requires_grad_(), *data[1:]]
                over = backward(anew(VanillaKD(T, 0.5, overwrite_logits=True)), *spare)
                yield peak_row("KL + CE, overwriting", f"{said}, against one gradient", over, data[0].nbytes, 0.1)


def against_logarithms(memory: str, shapes: tuple[tuple[int, int], ...] = ((64, 32_000),)) -> Iterator[Row]:
    """Against DistillKit's formulas."""
    for tokens, vocab in shapes:
        data = logits(tokens, vocab)
        with engine_as(False) as how:
            said = f"{shape(tokens, vocab)} fp32, {how}, memory {memory}, against DistillKit's formula"
            for name, (ours, recipe) in BY_LOGARITHMS.items():
                yield time_row(name, said, backward(ours, *data), backward(recipe, *data))


def large(
    memory: str,
    cases: tuple[tuple[int, int, torch.dtype], ...] = (
        (256, 128_256, torch.float32),
        (2048, 32_000, torch.bfloat16),
    ),
) -> Iterator[Row]:
    """KL + CE with the sizes of a real training step."""
    for tokens, vocab, dtype in cases:
        data = logits(tokens, vocab, dtype)
        with engine_as(False) as how:
            said = f"{shape(tokens, vocab)} {short(dtype)}, {how}, memory {memory}, against the plain recipe"
            steps = [backward(loss, *data) for loss in PAIRS["KL + CE"]]
            yield time_row("KL + CE", said, *steps)
            if memory == "fresh":
                yield peak_row("KL + CE", said, *steps)


def error_in_bfloat16(memory: str, tokens: int = 64, vocab: int = 128_256) -> Iterator[Row]:
    """The error of the gradient relative to its norm, against float64 on the same rounded logits."""
    student, teacher, labels = logits(tokens, vocab, torch.bfloat16)

    def gradient(loss: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        z = student.detach().to(dtype).requires_grad_()
        return torch.autograd.grad(loss(z, teacher.to(dtype), labels), z)[0].double()

    exact = gradient(recipes.kl, torch.float64)
    losses = {"ours": kdloss.VanillaKD(T, 0.0), "the plain recipe's": recipes.kl}
    for whose, loss in losses.items():
        error = (gradient(loss, torch.bfloat16) - exact).norm() / exact.norm()
        goal = 4e-3 if whose == "ours" else None
        yield Row(
            f"KL: error of the gradient, {whose}", f"{shape(tokens, vocab)} bf16, against float64", error.item(), goal
        )


def moved(memory: str, rows: int = 8, vocab: int = 32_000) -> Iterator[Row]:
    """The bytes that a step moves per logit of one side, forward and backward, for one block of positions."""
    from moved import bytes_moved

    for dtype, goal in ((torch.float32, 24), (torch.bfloat16, 12)):
        data = logits(rows, vocab, dtype)
        ours, recipe = PAIRS["KL + CE"]
        whose = {"the plain recipe": recipe, "the compiled recipe": torch.compile(recipe)}
        for compiled in (True, False):
            with engine_as(compiled) as how:
                backward(ours, *data)()  # checks at first use do not count
                count = bytes_moved(backward(ours, *data), vocab) / data[0].numel()
            said = f"{shape(rows, vocab)} {short(dtype)}, {how}"
            yield Row("KL + CE: bytes moved per logit", said, count, goal if compiled else None)
        for name, loss in whose.items():
            count = bytes_moved(backward(loss, *data), vocab) / data[0].numel()
            yield Row(f"KL + CE: bytes moved per logit, {name}", f"{shape(rows, vocab)} {short(dtype)}", count)
