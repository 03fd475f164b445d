"""Compare random cases with a float64 reference: `PYTHONPATH=tests python nightly/fuzz.py --cases 200000 --seed 1`.

A case is one call of a criterion with random kinds of logits, terms, shapes (also with zeros), dtypes, strides, masks,
extreme numbers and reductions. Its value, its components and all gradients are compared with nightly/reference.py. The
first case that differs is printed with the command that runs it alone.
"""

import argparse
import importlib
import sys
import time
import traceback
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from cases import Case, Term
from drawing import draw
from reference import Expected, expected

import kdloss

at_once = importlib.import_module("kdloss.engine.at_once")
block_sizes = importlib.import_module("kdloss.engine.block_sizes")
OWN = {"FEW": at_once.FEW, "AT_ONCE": at_once.AT_ONCE, "rows": block_sizes.scratch_rows}


def paths(case: Case) -> None:
    """Set the engine's block sizes, so that few rows take the path of many; fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(case.nan_memory)  # fills the memory of torch.empty
    at_once.FEW = case.engine.get("FEW", OWN["FEW"])
    at_once.AT_ONCE = case.engine.get("AT_ONCE", OWN["AT_ONCE"])
    rows = case.engine.get("rows")
    block_sizes.scratch_rows = OWN["rows"] if rows is None else lambda *_: rows


class Output:
    """The output of a model."""

    def __init__(self, logits: Any, hidden_states: Any) -> None:
        self.logits, self.hidden_states = logits, hidden_states


def function(term: Term) -> Any:
    """The function with its options. A divergence gets its temperature from the term."""
    told = {"temperature"} if term.kind == "kd" else set()
    options = {name: value for name, value in term.loss.settings.items() if name not in told}
    return partial(term.loss.function, **options) if options else term.loss.function


def features(case: Case, term: Term) -> dict[str, Any]:
    """The arguments of a feature term."""
    widths = {} if term.projection is None else {"widths": tuple(side[0].seen.shape[-1] for side in case.hidden)}
    layout = "b h w c" if len(case.shape) == 3 else None
    pairing = [(i, i) for i in range(term.pairs)]
    return {"pairing": pairing, "distance": function(term), "depths": (2, 2), "layout": layout, **widths}


def made(case: Case, term: Term) -> Any:
    """Build a term of the sum."""
    if term.kind == "ce":
        return kdloss.CrossEntropy(label_smoothing=term.smoothing, class_weights=term.class_weights)
    if term.kind == "feature":
        return kdloss.Features(**features(case, term))
    return kdloss.Logits(
        function(term),
        temperature=term.temperature,
        teacher=term.teacher,
        weights=term.weights if isinstance(term.teacher, str | tuple) else None,
        average=term.average,
        vocabulary=term.vocabulary,
        positions="mask" if term.by_mask else "labels",
        name=term.name,
    )


def weight_of(term: Term) -> Any:
    """The weight of a term, as a parameter if it is learned."""
    return torch.nn.Parameter(torch.tensor(term.weight, dtype=torch.float64)) if term.learned else term.weight


def criterion_of(case: Case) -> Any:
    """Build the criterion: a recipe, or a sum of weighted terms."""
    said = {"causal": case.causal, "reduction": case.reduction, "overwrite_logits": case.overwrite}
    if case.recipe is None:
        found = kdloss.Sum(*(weight_of(term) * made(case, term) for term in case.terms), layout=case.layout, **said)
    else:
        ce, *_, kd = case.terms
        said |= {"alpha": ce.weight, "temperature": kd.temperature, "divergence": function(kd)}
        said |= {"vocabulary": kd.vocabulary}
        if case.recipe == "FeatureKD":
            share = kd.weight / (1 - ce.weight)
            said |= {"logit_weight": share, "logit_layout": case.layout, **features(case, case.terms[1])}
        else:
            said["layout"] = case.layout
        if case.recipe == "MultiTeacherKD":
            said |= {"weights": kd.weights, "average": kd.average}
        found = getattr(kdloss, case.recipe)(**said)
    for term in case.terms:
        for projection in found.terms[term.name].projections.values() if term.projection else ():
            projection.double()
            for own, drawn in zip(projection.parameters(), term.projection, strict=True):
                own.data.copy_(drawn)
    return found


def ours(case: Case) -> tuple[Any, list[Any], dict[str, float]]:
    """The value, gradients and components that kdloss computes."""
    criterion = criterion_of(case)
    for _ in range(1 + case.twice):
        leaves = [x.base.clone().requires_grad_() for x in case.student.leaves]
        hidden = [x.base.clone().requires_grad_() for x in case.hidden[0]]
        student: Any = case.student.build(leaves)
        teachers: Any = [t.given() for t in case.teachers]
        if hidden:
            states = [leaf.view(base) for leaf, base in zip(case.hidden[0], hidden, strict=True)]
            student = Output(student, states)
            teachers = [Output(t, [leaf.seen for leaf in case.hidden[1]]) for t in teachers]
        several = criterion.several or len(teachers) > 1
        teacher = teachers if several else teachers[0]
        value = criterion(student, teacher, case.labels, mask=case.mask, num_items_in_batch=case.items)
        wanted = [*leaves, *hidden, *criterion.parameters()]
        if not value.requires_grad:
            raise AssertionError("the loss has no gradient")
        got = torch.autograd.grad((value * torch.as_tensor(case.upstream)).sum(), wanted, allow_unused=True)
        gradients = [
            np.zeros(tuple(x.shape)) if g is None else g.double().numpy() for g, x in zip(got, wanted, strict=True)
        ]
    components = {name: x.double().item() for name, x in criterion.components.items()}
    return value.detach().double().numpy(), gradients, components


def differences(case: Case) -> list[str]:
    """The differences of a case from the reference, in words."""
    paths(case)
    try:
        value, gradients, components = ours(case)
    finally:
        paths(Case())
    exact = expected(case)
    if exact.vague:
        return []
    found = list(_differs("value", value, exact.value, exact.value_tolerance))
    for name, (number, tolerance) in exact.components.items():
        found += _differs(f"component {name}", np.array(components[name]), np.array(number), np.array(tolerance))
    if not exact.blind:
        found += _gradients(gradients, exact)
    return found


def _gradients(gradients: list[Any], exact: Expected) -> Any:
    if len(gradients) != len(exact.gradients):
        yield f"{len(gradients)} gradients, {len(exact.gradients)} expected"
    for k, (g, e, tolerance) in enumerate(zip(gradients, exact.gradients, exact.tolerances, strict=False)):
        yield from _differs(f"gradient {k}", g, e, np.where(np.isinf(g) & (abs(e) > 3e4), np.inf, tolerance))


WORST: dict[str, float] = {}


def _differs(name: str, got: Any, exact: Any, tolerance: Any) -> Any:
    exact = np.asarray(exact)
    if got.shape != exact.shape:
        yield f"{name} has shape {got.shape}, {exact.shape} expected"
        return
    same = (got == exact) | (np.isinf(exact) & np.isinf(got) & (got == exact))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0, abs(got - exact) / np.maximum(tolerance, 1e-300))
    off = np.where(np.isnan(off) & ~np.isinf(tolerance), np.inf, np.nan_to_num(off))
    worst = off.max(initial=0)
    WORST[name.split()[0]] = max(WORST.get(name.split()[0], 0), worst)
    if worst > 1:
        at = np.unravel_index(off.argmax(), off.shape) if off.ndim else ()
        place = f"{name} at {tuple(map(int, at))}" if at else name
        yield f"{place} is {got[at]}, expected {exact[at]}: {worst:.3g} times the tolerance"


def wrong_with(case: Case) -> list[str]:
    """What is wrong with a case: its differences, or the error with the end of its traceback."""
    try:
        return differences(case)
    except Exception as error:
        lines = traceback.format_tb(error.__traceback__)[-3:]
        return [f"{type(error).__name__}: {error}", *"".join(lines).splitlines()]


def main(given: list[str] | None = None) -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description="Compare random cases with a float64 reference")
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--keep-going", type=int, default=0, metavar="N", help="continue after N cases that differ")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    started, wrong = time.process_time(), 0
    for number in range(args.first, args.first + args.cases):
        if (done := number - args.first) and done % 10_000 == 0:
            print(f"{done} cases, {time.process_time() - started:.0f} s of CPU time, {wrong} differ", flush=True)
        case = draw(args.seed, number)
        if not (found := wrong_with(case)):
            continue
        wrong += 1
        print(f"case {number}: {'; '.join(case.words)}", *found, sep="\n  ")
        print(f"  PYTHONPATH=tests python nightly/fuzz.py --seed {args.seed} --first {number} --cases 1", flush=True)
        if wrong > args.keep_going:
            break
    seconds = time.process_time() - started
    share = ", ".join(f"{name} {x:.2f}" for name, x in WORST.items())
    print(f"{number + 1 - args.first} cases of seed {args.seed} in {seconds:.0f} s of CPU time, {wrong} differ")
    print(f"largest differences, as a share of the tolerance: {share}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
