"""Draw random cases. A case depends only on the seed and its number, not on the cases before."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import losses
import numpy as np
import torch
from cases import Case, Leaf, Logits, Term
from torch import Tensor

from kdloss import TokenMap, TopKLogits, truncate

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF, NAN = float("inf"), float("nan")
ENGINES = {}, {"FEW": 0}, {"FEW": 0, "AT_ONCE": 0}, {"FEW": 0, "AT_ONCE": 0, "rows": 2}
DIVERGENCES = {loss.name.split("-")[0]: loss for loss in losses.DIVERGENCES}
DISTANCES = [x for x in losses.DISTANCES if not x.name.startswith(("CRD", "MGD", "VID", "rkd_angle"))]
MSE = next(x for x in DISTANCES if x.name == "mse")
OF_LOGITS = {"logit_mse", "bernoulli_kl", "standardized_forward_kl", "with_teacher_temperature"}  # not of probabilities
OF_ONE_CLASS = {"logit_mse", "bernoulli_kl"}
NO_TOP_K = {"dkd", "nkd", "dist", "sinkhorn", "uld", "hard_labels"} | OF_LOGITS
NO_INF = {"logit_mse", "standardized_forward_kl", "bernoulli_kl"}
WHOLE = {"dist", "uld"}  # they need all logits at once


class Draw:
    """Random choices, logged in words."""

    def __init__(self, seed: int, number: int) -> None:
        self.r = np.random.default_rng([seed, number])
        self.words: list[str] = []

    def one(self, word: str, choices: Iterable[Any], p: Any = None) -> Any:
        """Choose one of these."""
        choices = list(choices)
        found = choices[self.r.choice(len(choices), p=p)]
        self.words.append(f"{word}={getattr(found, '__name__', found)}")
        return found

    def chance(self, p: float, word: str = "") -> bool:
        """Draw whether something happens."""
        found = bool(self.r.random() < p)
        if found and word:
            self.words.append(word)
        return found

    def number(self, word: str, choices: Iterable[Any], p: Any = None) -> float:
        """Draw one of these numbers."""
        return float(self.one(word, choices, p))

    def leaf(self, numbers: Any, dtype: torch.dtype, word: str, expanded: bool = False) -> Leaf:
        """Put these numbers in a tensor with one of several strides."""
        x = torch.as_tensor(np.asarray(numbers), dtype=torch.float64).to(dtype)
        kinds = ["whole", "turned", "sliced", "late"]
        if expanded and x.ndim > 1 and x.shape[0] > 1 and x[:1].isfinite().all():
            kinds.append("expanded")
        kind = self.one(f"{word} strides", kinds) if x.ndim and self.chance(0.5) else "whole"
        if kind == "turned":
            return Leaf(x.movedim(-1, 0).contiguous(), partial(torch.movedim, source=0, destination=-1))
        if kind == "sliced":
            return Leaf(torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2), _every_other)
        if kind == "late":
            return Leaf(torch.cat([torch.full_like(x[:1], NAN), x]), _but_the_first)
        if kind == "expanded":
            return Leaf(x[:1].clone(), partial(Tensor.expand, size=x.shape))
        return Leaf(x, _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def _every_other(x: Tensor) -> Tensor:
    return x[..., ::2]


def _but_the_first(x: Tensor) -> Tensor:
    return x[1:]


def draw(seed: int, number: int) -> Case:
    """Draw the case with this number."""
    d, case = Draw(seed, number), Case()
    _shape(d, case)
    dtype = d.one("dtype", DTYPES, [0.55, 0.15, 0.15, 0.15])
    several = d.chance(0.2, "several teachers")
    _recipe(d, case, several) if d.chance(0.2) else _sum(d, case, several)
    _classes(d, case)
    _labels(d, case)
    counted = np.unique(np.concatenate([case.counted(term)[0] for term in case.terms]))
    _logits(d, case, dtype, counted)
    _features(d, case, dtype, counted)
    _contract(d, case, dtype)
    case.words = [f"shape={case.shape}", *d.words]
    return case


def _shape(d: Draw, case: Case) -> None:
    case.causal = d.chance(0.25, "causal")
    axes = d.r.choice([1, 2, 3], p=[0.3, 0.55, 0.15])
    case.shape = tuple(int(n) for n in d.r.choice([0, 1, 2, 3, 4, 5], max(axes, 2) if case.causal else axes))


def _recipe(d: Draw, case: Case, several: bool) -> None:
    """Draw a recipe: a criterion with a name."""
    alpha = d.number("alpha", [0.5, 0.3, 0.01, 0.99])
    case.recipe = d.one("recipe", ["VanillaKD", "FeatureKD"])
    case.recipe = "MultiTeacherKD" if several else case.recipe
    case.terms.append(Term("ce", "ce", alpha))
    if case.recipe == "FeatureKD":
        case.terms.append(Term("feature", "feature", 1 - alpha, loss=d.one("distance", DISTANCES)))
    kd = _divergence(d, "kd", several)
    share = d.number("logit_weight", [1.0, 0.5]) if case.recipe == "FeatureKD" else 1.0
    kd.by_mask, kd.weight, kd.teacher = False, (1 - alpha) * share, "all" if several else 0
    case.terms.append(kd)


def _sum(d: Draw, case: Case, several: bool) -> None:
    """Draw terms and their weights."""
    if d.chance(0.6):
        term = Term("ce", "ce", d.number("w", [1.0, 0.5, 0.01, 3.0]))
        term.smoothing = d.number("smoothing", [0.0, 0.1, 1.0], [0.7, 0.2, 0.1])
        case.terms.append(term)
    for k in range(d.r.choice(4, p=[0.1, 0.6, 0.2, 0.1]) or int(not case.terms)):
        case.terms.append(_divergence(d, f"kd{k}", several))
    read = {term.teacher for term in case.kds}
    if several and read <= {0, 1} and read != {0, 1} and read:  # every teacher needs a term that reads it
        case.kds[-1].teacher = 1 if read == {0} and len(case.kds) > 1 else "all"
    if d.chance(0.2):
        pairs = 1 + d.chance(0.2, "two pairs")
        case.terms.append(Term("feature", "feature", 0.7, loss=d.one("distance", DISTANCES), pairs=pairs))
    for term in case.terms:
        term.learned = d.chance(0.15, "learned weight")
        term.weight = 0.0 if term.learned and d.chance(0.4, "of 0") else term.weight


def _divergence(d: Draw, name: str, several: bool) -> Term:
    loss = DIVERGENCES[d.one("divergence", DIVERGENCES)]
    temperature = d.number("T", [1.0, 2.0, 0.05, 0.5, 4.0, 100.0, np.exp(d.r.uniform(-3, 4.6))])
    term = Term(name, "kd", d.number("w", [1.0, 0.5, 2.0]), loss=loss, temperature=temperature)
    term.loss = replace(loss, settings={"temperature": temperature, **_options(d, term.function)})
    term.by_mask = not loss.labelled and d.chance(0.1, "by mask")
    if several and not loss.labelled:
        term.teacher = d.one("teacher", [0, 1, "all", (1, 0)])
    share = d.number("share", [0.5, 0.25, 0.0, 1.0, 1e-3])
    term.weights = None if d.chance(0.3, "equal") else [share, 1 - share]
    term.average = d.one("average", ["probabilities", "logits"]) if term.function not in OF_LOGITS else "logits"
    return term


def _options(d: Draw, name: str) -> dict[str, Any]:
    u = float(d.r.uniform(0.02, 0.98))
    skew = {"skew": d.one("skew", [0.0, 0.1, u, 1e-3])} if name.startswith("skewed") else {}
    draws: dict[str, Callable[[], dict[str, Any]]] = {
        "jsd": lambda: {"beta": d.one("beta", [0.0, 1.0, 0.5, u, 1e-4]), "normalize": d.chance(0.5, "normalize")},
        "adaptive_kl": lambda: {"head": d.one("head", [0.5, u])},
        "alpha_divergence": lambda: {"alpha": d.one("alpha", [0.0, 1.0, 0.5, u, 1 - 1e-4])},
        "renyi": lambda: {"order": d.one("order", [0.5, 1.0, 2.0, u, 1 - 1e-4])},
        "ab_divergence": lambda: dict(
            zip(
                ("alpha", "beta"),
                d.one("alpha, beta", [(0.2, 0.7), (1, 0), (0, 1), (1e-4, 0.5), (u, 1 - u)]),
                strict=True,
            )
        ),
        "dkd": lambda: {"alpha": d.one("alpha", [1.0, 2.0, 0.0]), "beta": d.one("beta", [8.0, 0.5])},
        "nkd": lambda: {"gamma": d.one("gamma", [1.5, 0.0, 3.0])},
        "dist": lambda: {"beta": d.one("beta", [1.0, 2.0]), "gamma": d.one("gamma", [1.0, 0.0])},
        "sinkhorn": lambda: {"epsilon": 0.3},
    }
    return skew | draws.get(name, dict)()


def _classes(d: Draw, case: Case) -> None:
    """Draw the number of classes of both sides, and the classes that they share."""
    names = {term.function for term in case.kds}
    least = 1 if names <= OF_ONE_CLASS and not any(term.kind == "ce" for term in case.terms) else 2
    case.classes = max(int(d.one("classes", [1, 2, 3, 5, 9, 40], [0.05, 0.15, 0.25, 0.3, 0.2, 0.05])), least)
    case.teacher_classes = case.classes
    labelled = "uld" in names or any(term.loss.labelled for term in case.kds)
    if not case.kds or labelled or case.classes == 1 or not d.chance(0.15):
        return
    case.teacher_classes = int(d.one("teacher classes", [2, 3, 6, 12]))
    vocabulary: Any = truncate
    if d.chance(0.6):
        shared = int(d.r.integers(least, min(case.classes, case.teacher_classes) + 1))
        sides = case.classes, case.teacher_classes
        vocabulary = TokenMap(*(torch.as_tensor(d.r.permutation(many)[:shared]) for many in sides))
    d.words.append(f"vocabulary={vocabulary}")
    for term in case.kds:
        term.vocabulary = vocabulary


def _labels(d: Draw, case: Case) -> None:
    needs_classes = any(term.loss.labelled for term in case.kds)
    if needs_classes or any(term.kind == "ce" for term in case.terms) or d.chance(0.3):
        if not needs_classes and d.chance(0.1):
            soft = d.r.dirichlet(np.ones(case.classes), case.shape).reshape(*case.shape, case.classes)
            case.labels = torch.as_tensor(soft).to(d.one("soft labels", [torch.float32, torch.float64]))
        else:
            ignored = d.r.random(case.shape) < d.one("ignored", [0.0, 0.3, 1.0], [0.6, 0.35, 0.05])
            case.labels = torch.as_tensor(np.where(ignored, -100, d.r.integers(0, case.classes, case.shape)))
    if d.chance(0.4):
        kept = d.one("kept by mask", [0.7, 0.0, 1.0], [0.8, 0.1, 0.1])
        case.mask = torch.as_tensor(np.asarray(d.r.random(case.shape) < kept))
    for term in case.terms:
        term.by_mask = term.by_mask and case.labels is not None
        if term.kind == "ce" and case.recipe is None and d.chance(0.15, "class weights"):
            term.class_weights = torch.as_tensor(d.r.choice([0.0, 0.5, 1.0, 3.0], case.classes), dtype=torch.float32)
        if term.function == "dist" and len(case.counted(term)[0]) <= 1:
            term.loss.settings["gamma"] = 0.0  # there are no columns


def _numbers(d: Draw, rows: int, classes: int, inf: bool, word: str) -> Any:
    kinds = ["normal", "huge", "sure", "offset", "flat", "small", "ties"]
    kind = d.one(word, kinds, [0.4, 0.12, 0.12, 0.1, 0.06, 0.1, 0.1])
    z = 3 * d.r.standard_normal((rows, classes))
    if kind == "huge":
        z = d.r.uniform(-1e4, 1e4, z.shape)
    elif kind == "sure" and rows:
        z[np.arange(rows), d.r.integers(0, classes, rows)] += d.number("by", [30.0, 100.0, 1e4, -1e4])
    elif kind == "offset":
        z = 1e4 * d.r.choice([-1, 1]) + np.round(z * 16) / 16
    elif kind == "flat":
        z = np.full(z.shape, d.r.choice([0.0, 7.0]))
    elif kind == "small":
        z = 1e-3 * z
    elif kind == "ties":
        z = np.floor(z / 2)
    if inf and classes > 1 and d.chance(0.1, "-inf"):
        out = d.r.random(z.shape) < 0.3
        out[np.arange(rows), z.argmax(-1)] = False
        z[out] = -INF
    return z


def _logits(d: Draw, case: Case, dtype: torch.dtype, counted: Any) -> None:
    names, kds, rows = {term.function for term in case.kds}, case.kds, int(np.prod(case.shape))
    teachers = 2 if any(term.teacher != 0 for term in kds) else 1
    top_k = bool(kds) and teachers == 1 and not names & NO_TOP_K and d.chance(0.2, "top-k")
    inf = not names & NO_INF and case.teacher_classes == case.classes and not top_k
    inf = inf and not any(term.vocabulary or (teachers > 1 and term.average == "logits") for term in kds)
    lazy = d.chance(0.2, "lazy student")
    z = _numbers(d, rows, case.classes, inf and not lazy, "student")
    for _ in range(teachers):
        kind = dtype if d.chance(0.8) else d.one("teacher dtype", DTYPES)
        if top_k:
            t = _numbers(d, rows, case.teacher_classes, False, "teacher")
            case.teachers.append(_top_k(d, t, case.shape, kds[0].temperature))
        elif d.chance(0.15, "lazy teacher"):
            case.teachers.append(_lazy(d, case.shape, case.teacher_classes, kind))
        else:
            t = _numbers(d, rows, case.teacher_classes, inf, "teacher")
            if not lazy and t.shape == z.shape and d.chance(0.15):
                apart = d.number("apart", [0.0, 1e-2, 1e-4])
                t = z + np.where(np.isinf(z), 0, apart * d.r.standard_normal(z.shape))
            t = _garbage(d, t, counted).reshape(*case.shape, case.teacher_classes)
            case.teachers.append(Logits([d.leaf(t, kind, "teacher", expanded=True)]))
    if lazy:
        case.student = _lazy(d, case.shape, case.classes, dtype)
    else:
        z = _garbage(d, z, counted).reshape(*case.shape, case.classes)
        case.student = Logits([d.leaf(z, dtype, "student", expanded=d.chance(0.1))])


def _garbage(d: Draw, z: Any, counted: Any) -> Any:
    """Put NaN or infinity at positions that do not count."""
    if d.chance(0.5):
        z = z.copy()
        z[np.setdiff1d(np.arange(len(z)), counted)] = d.one("garbage", [NAN, INF, -INF])
    return z


def _lazy(d: Draw, shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> Logits:
    """Hidden states and a head with numbers that are exact in every dtype, and so are their logits."""
    width = int(d.r.integers(1, 5))

    def quarters(*size: int) -> Any:
        return d.r.integers(-4, 5, size) / 4

    leaves = [d.leaf(4 * quarters(*shape, width), dtype, "hidden"), d.leaf(quarters(classes, width), dtype, "head")]
    if d.chance(0.4, "bias"):
        leaves.append(d.leaf(quarters(classes), dtype, "bias"))
    cap = d.number("softcap", [1.0, 5.0, 30.0]) if dtype.itemsize > 2 and d.chance(0.3) else None
    return Logits(leaves, cap, d.number("scale", [1.0, 0.5, 2.0], [0.8, 0.1, 0.1]))


def _top_k(d: Draw, z: Any, shape: tuple[int, ...], temperature: float) -> Logits:
    classes = z.shape[-1]
    k, at = int(d.r.integers(1, classes + 1)), d.number("kept at", [temperature, temperature, 1.0, 0.5, 3.0])
    log_p = z / at - np.logaddexp.reduce(z / at, -1, keepdims=True)
    ids = np.argsort(-z, -1, kind="stable")[:, :k]
    ids = d.r.permuted(ids, axis=1) if d.chance(0.5) else ids
    kept, others = np.take_along_axis(log_p, ids, -1), log_p.copy()
    np.put_along_axis(others, ids, -INF, -1)
    rest = np.logaddexp.reduce(others, -1)
    if k > 1 and d.chance(0.2, "empty slots"):
        gone = d.r.random(kept.shape) < 0.3
        rest = np.logaddexp(rest, np.logaddexp.reduce(np.where(gone, kept, -INF), -1))
        ids = np.where(gone, -1, ids)
    tail = d.one("tail", ["bucket", "renormalise", "uniform"])
    kind = d.one("kept as", [torch.float32, torch.float64, torch.float16])
    kind = torch.float32 if (kept < -60000).any() else kind
    told = kind == torch.float16 or bool((rest < np.log(0.02)).any()) or d.chance(0.5)
    integers = torch.as_tensor(ids.reshape(*shape, k)).to(d.one("ids", [torch.int64, torch.int32, torch.int16]))
    numbers, own = torch.as_tensor(kept.reshape(*shape, k)).to(kind), torch.as_tensor(rest.reshape(shape)).float()
    d.words.append(f"k={k} of {classes}")
    return Logits([], kept=TopKLogits(integers, numbers, tail, at, own if told else None, classes))


def _features(d: Draw, case: Case, dtype: torch.dtype, counted: Any) -> None:
    """Draw hidden states of three layers for a feature term, with enough rows for distances that relate rows."""
    term = next((t for t in case.terms if t.kind == "feature"), None)
    if term is None:
        return
    rows = int(np.prod(case.shape))
    per_example = int(np.prod(case.shape[1:])) if len(case.shape) > 1 else rows
    mine = case.counted(term)[0] // max(per_example, 1)
    sizes = np.bincount(mine) if len(mine) else np.zeros(0)
    few = per_example - case.causal < 4 or ((sizes > 0) & (sizes < 4)).any()
    if "relational" in term.loss.exempt and few:
        term.loss = MSE
        d.words.append("mse instead")
    width = max(term.loss.width(int(d.r.integers(2, 5))), 2)
    project = d.chance(0.3, "projection") and not term.loss.exempt & {"width"}
    for side, many in zip(case.hidden, (width + project, width), strict=True):
        for _ in range(3):
            numbers = d.r.standard_normal((rows, many)) * d.number("size", [1.0, 30.0, 0.1])
            side.append(d.leaf(_garbage(d, numbers, counted).reshape(*case.shape, many), dtype, "features"))
    if project:
        weight = d.r.standard_normal((width, width + 1)), d.r.standard_normal(width)
        term.projection = torch.as_tensor(weight[0]), torch.as_tensor(weight[1])


def _contract(d: Draw, case: Case, dtype: torch.dtype) -> None:
    case.reduction = d.one("reduction", ["mean", "sum", "none"], [0.6, 0.15, 0.25])
    if case.reduction == "mean" and d.chance(0.2):
        case.items = int(d.one("items", [1, 7, 1000]))
    told = case.mask is not None or (case.labels is not None and not case.labels.is_floating_point())
    either = bool({case.classes, case.teacher_classes} & {*case.shape})  # their axis may be another one
    if len(case.shape) == 3 and (not told or either or d.chance(0.5)):
        case.layout = "b h w c"
    whole = not case.student.lazy and "student strides=expanded" not in d.words
    whole = whole and dtype != torch.float16 and not {term.function for term in case.kds} & WHOLE
    case.overwrite = whole and case.reduction != "none" and d.chance(0.1, "overwrite")
    case.twice = not case.overwrite and d.chance(0.3, "twice")
    case.engine = d.one("engine", ENGINES)
    case.upstream = d.r.choice([1.0, 0.5, 100.0])
    if case.reduction == "none":
        case.upstream = d.r.choice([0.0, 1.0, -2.0, 0.3], case.stands.shape)
    case.nan_memory = d.chance(0.5, "NaN in fresh memory")
