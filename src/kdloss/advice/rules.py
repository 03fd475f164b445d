"""The rules of docs/guide.md, each with our measurements (docs/results.md)."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from kdloss.advice.facts import Pair
from kdloss.distances import layer_norm_mse, mse, normalized_mse

Goal = Literal["safe", "quality", "speed"]
Method = Literal["vanilla", "feature", "both"]
Quality = Literal["strong", "moderate", "weak"]
Task = Literal["easy", "hard"]

SHARES = {  # alpha by teacher and task
    ("strong", "easy"): (0.2, 0.3),
    ("strong", "hard"): (0.4, 0.5),
    ("moderate", "easy"): (0.5, 0.6),
    ("moderate", "hard"): (0.6, 0.7),
    ("weak", "easy"): (0.7, 0.9),
    ("weak", "hard"): (0.7, 0.9),
}


class Reasoned(NamedTuple):
    """A setting and the reason for it."""

    value: Any
    reason: str


def sizes(pair: Pair) -> str:
    """The sizes and families of both models, in words."""
    ours, theirs = pair.student, pair.teacher
    named = " and ".join(dict.fromkeys(filter(None, (ours.family, theirs.family))))
    related = {
        True: f"architectures are alike ({named})" if named else "architectures are alike",
        False: f"architectures are unlike ({named})" if named else "architectures are unlike",
        None: "whether architectures are alike is not known",
    }
    return f"{ours.parameters:,.0f} parameters against {theirs.parameters:,.0f}; {related[pair.alike]}"


def method(pair: Pair, goal: Goal) -> Reasoned:
    """Choose what the student learns from: the output, features or both."""
    if pair.alike is False:
        llama = "a Llama under a GPT-2: alone 237, vanilla 137, features of the last block 194"
        return _beside("vanilla", "the output, where architectures are unlike", llama)
    if not pair.found:
        return Reasoned("vanilla", "rule: the output, where hidden states are out of reach")
    measured = {
        "safe": "vanilla was ahead of training alone under every strong teacher; features gave less (180 against 140)",
        "quality": "equal to vanilla with 20 of 30 blocks kept (71 against 72), ahead with 15 (186 against 211)",
        "speed": "a step took 0.74 of vanilla's time, 0.85 of its memory; features alone gave less (180 against 140)",
    }
    rule = {
        "safe": "features, where architectures are alike",
        "quality": "features and output, for as much quality as can be had",
        "speed": "features, whose teacher stops early, where time or memory is short",
    }
    chosen = {"safe": "vanilla", "quality": "both", "speed": "feature"}
    return _beside(chosen[goal], rule[goal], measured[goal])


def temperature(pair: Pair) -> Reasoned:
    """Choose the temperature."""
    high: float
    if pair.alike is False:
        low, high, gap = 7, 10, "unlike architectures"
        measured = "1 was best for a Llama under a GPT-2: 1, 2, 4, 8 gave 137, 162, 183, 199"
    elif pair.smaller < 2:
        low, high, gap = 1, 1.5, "a student less than 2x smaller"
        measured = "1 was best at 2.5x"
    elif pair.smaller <= 4:
        low, high, gap = 2, 3, "a student 2x to 4x smaller"
        measured = "1 was best at 2.5x: 0.5, 1, 2, 4, 8 gave 170, 140, 158, 183, 194"
    else:
        low, high, gap = 4, 6, "a student more than 4x smaller"
        measured = "1 was best at 11x: 1, 2, 4, 8 gave 260, 290, 324, 364"
    return _beside(1.0 if pair.text else float(low), f"{low} to {high} for {gap}", measured)


def alpha(pair: Pair, quality: Quality, task: Task, *, features: bool) -> Reasoned:
    """Choose alpha, the share of cross-entropy."""
    low, high = SHARES[quality, task]
    rule = f"{low} to {high} for a {quality} teacher and {'an easy' if task == 'easy' else 'a hard'} task"
    if quality == "weak":
        harm = "only 0.9 did no harm, and it gained nothing (241 against 243 alone): get a better teacher"
        return _beside(high, rule, harm)
    if features:
        return _beside(0.3, "0.2 to 0.4 for features", "0.1, 0.3, 0.5, 0.7 gave 319, 311, 333, 361")
    if quality == "moderate":
        return _beside(low, rule, "nothing of this; with a strong teacher the lower the better")
    lower = "the lower the better: 0, 0.1, 0.3, 0.5 gave 138, 140, 158, 177"
    return _beside(0.1 if pair.text else low, rule, lower)


def features(pair: Pair) -> dict[str, Reasoned]:
    """Choose layers, pairing and distance."""
    ours, theirs = pair.student, pair.teacher
    if ours.maps and theirs.maps:
        return {
            "layers": Reasoned("auto", "all blocks that the pairing takes"),
            "pairing": Reasoned("resolution", "the last maps of each size; not measured"),
            "distance": Reasoned(mse, f"rule: plain mean squared error{_projected(pair)}; not measured on maps"),
        }
    if pair.kept:
        where = "what was measured of such students: with 15 of 30 blocks 186, against 418 alone"
        return {
            "layers": Reasoned("auto", f"rule: auto to begin with; {where}"),
            "pairing": Reasoned("kept", "made of the teacher's blocks: each against the one before the next kept one"),
            "distance": Reasoned(normalized_mse, f"rule: plain mean squared error; {where}"),
        }
    layers = _beside(
        "last" if pair.text else "auto",
        "auto to begin with, late for a task, key where memory is short",
        "last, late, auto, all, key gave 282, 285, 311, 316, 321",
    )
    pairing = Reasoned("uniform", "equal relative depth; measured on text: six pairings gave 311 to 314")
    outliers = pair.text or None not in (ours.width, theirs.width)
    distance = _beside(
        layer_norm_mse if outliers else mse,
        f"plain mean squared error{_projected(pair)}",
        "layer_norm_mse, cosine, mse, normalized_mse gave 311, 333, 333, 346",
    )
    return {"layers": layers, "pairing": pairing, "distance": distance}


def warnings(pair: Pair, goal: Goal) -> Iterator[str]:
    """Warnings about a pair of models."""
    ours, theirs = pair.student, pair.teacher
    if pair.smaller < 1:
        yield (
            f"the student is {1 / pair.smaller:.2g} times as large as the teacher. A teacher worse than its student "
            "made it worse wherever alpha was below 0.9: measure both on the same data first"
        )
    if pair.smaller > 10:
        yield (
            f"the student is {pair.smaller:.3g} times smaller. The rule is that beyond 10 times little is to be had; "
            "measured on text, 2.5, 4.5, 11 and 26 times smaller lowered perplexity by 44, 40, 36 and 33 %, and a "
            "chain of assistants ended behind the direct way (201 against 181)"
        )
    if goal != "safe" and pair.alike is False:
        yield (
            "features across unlike families are not suggested. The rule is that they want models of one family; "
            "measured on text they gained less than half of what vanilla did, and nothing was measured of both together"
        )
    elif goal != "safe" and not pair.found:
        yield (
            "features were not suggested, as no list of blocks was found, or several: kdloss.layers.find_blocks(model) "
            "says what there is, and kdloss.FeatureKD takes a list's name as blocks=..., or modules as layers=[...]"
        )
    elif goal != "safe" and pair.alike is None:
        yield "features want models of one family, and nothing tells whether these are"
    if ours.classes and theirs.classes and ours.classes != theirs.classes:
        yield _vocabularies(pair, ours.classes, theirs.classes)


def _vocabularies(pair: Pair, ours: int, theirs: int) -> str:
    differ = f"the student predicts {ours} {'tokens' if pair.text else 'classes'} and the teacher {theirs}"
    names = "student_tokenizer, teacher_tokenizer" if pair.text else "student.config.label2id, teacher.config.label2id"
    return (
        f"{differ}. Where one vocabulary is the other padded, write criterion(vocabulary=kdloss.truncate); where they "
        f"share some, criterion(vocabulary=kdloss.TokenMap.of({names})); where they share too little, "
        "criterion(divergence=kdloss.divergences.uld)"
    )


def _projected(pair: Pair) -> str:
    ours, theirs = pair.student.width, pair.teacher.width
    if ours is None or theirs is None:
        return ", after a trained linear map where widths differ"
    return "" if ours == theirs else f", after a trained linear map from {ours} to {theirs}"


def _beside(value: Any, rule: str, measured: str) -> Reasoned:
    return Reasoned(value, f"rule: {rule}; measured on text: {measured}")
