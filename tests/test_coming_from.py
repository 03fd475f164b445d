"""The factors that docs/coming_from.md states: other libraries' formulas, written out here, against the page's code.

nightly/test_peers.py runs the code of these libraries itself, where it can be installed.
"""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import readme
import torch
import torch.nn.functional as F
from families import batch, build
from torch import Tensor

import kdloss
from kdloss import distances, divergences

PAGE = (readme.ROOT / "docs" / "coming_from.md").read_text()
B, T, V = 2, 4, 7
LABELS = torch.tensor([[-100, 2, 5, 0], [-100, -100, 6, 1]])
COUNTED = LABELS != -100
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning", "ignore:.*loss_type=None.*")


def block(title: str, number: int = 0, **names: object) -> SimpleNamespace:
    """The variables after running one Python block under a heading of the page; `names` are those before it."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert section, f"no heading '## {title}'"
    code = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)[number]
    made = {"labels": LABELS, **names}
    exec(compile(code, f"docs/coming_from.md, {title}", "exec"), made)
    return SimpleNamespace(**made)


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    """Random logits of a student and a teacher, in float64."""
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, *(shape or (B, T, V)), dtype=torch.float64)
    return student.requires_grad_(), teacher


def of_page(title: str, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The loss that a block of the page computes from random logits, and these logits."""
    student, teacher = logits()
    return block(title, number, student_logits=student, teacher_logits=teacher).loss, student, teacher


def same(ours: Tensor, theirs: Tensor, student: Tensor, rtol: float = 1e-9) -> None:
    """Assert that values and gradients are equal."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    slopes = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=rtol, atol=rtol * slopes[0].abs().max().item())


def probabilities(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the student, probabilities of the teacher."""
    return (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at every position, without T²."""
    return F.kl_div(*probabilities(student, teacher, temperature), reduction="none").sum(-1)


def entropy(teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The teacher's entropy at every position."""
    p = (teacher / temperature).softmax(-1)
    return -(p * p.log()).sum(-1)


def ce(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, the mean over the labels that count."""
    return F.cross_entropy(student.flatten(0, -2), labels.flatten())


def without_last(*tensors: Tensor) -> list[Tensor]:
    """Logits without the last position, which has no label t + 1."""
    return [x[:, :-1] for x in tensors]


def counted(values: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels that count."""
    return values[labels != -100].mean()


def test_the_first_block_of_the_page_has_a_loss_with_t_squared_and_one_without():
    student, teacher = logits()
    names = {"student_logits": student, "teacher_logits": teacher, "labels": LABELS}
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    first, last = code.split("unscaled =")
    exec(first, names)
    with_factor = names["loss"]
    exec(f"unscaled ={last}", names)
    s, t = without_last(student, teacher)
    both = [0.5 * ce(s, LABELS[:, 1:]) + 0.5 * x * counted(kl(s, t, 2.0), LABELS[:, 1:]) for x in (4.0, 1.0)]
    same(with_factor, both[0], student)
    same(names["loss"], both[1], student)


def test_reductions_of_plain_kl_div_divide_by_examples_positions_or_classes():
    student, teacher = logits()
    ours = 1.0 * kdloss.Logits(partial(divergences.forward_kl, t_squared=False), temperature=3.0)
    pair = probabilities(student, teacher, 3.0)
    flat = [x.flatten(0, 1) for x in pair]
    same(ours(student, teacher), F.kl_div(*flat, reduction="batchmean"), student)
    same(T * ours(student, teacher), F.kl_div(*pair, reduction="batchmean"), student)
    same(ours(student, teacher) / V, F.kl_div(*pair, reduction="mean"), student)
    soft = -(pair[1] * pair[0]).sum(-1).mean()
    same(ours(student, teacher) + entropy(teacher, 3.0).mean(), soft, student)
    scaled = 1.0 * kdloss.Logits(temperature=3.0)
    same(scaled(student, teacher) / 9, F.kl_div(*flat, reduction="batchmean"), student)
    padded = 0.5 * kdloss.CrossEntropy() + 0.5 * kdloss.Logits(temperature=3.0, positions="mask")
    everywhere = 0.5 * ce(student, LABELS) + 0.5 * 9 * kl(student, teacher, 3.0).mean()
    same(padded(student, teacher, LABELS), everywhere, student)


def test_plain_code_that_shifts_logits_and_labels_equals_causal():
    student, teacher = logits()
    s, t = without_last(student, teacher)
    theirs = 0.3 * ce(s, LABELS[:, 1:]) + 0.7 * 4 * counted(kl(s, t, 2.0), LABELS[:, 1:])
    same(kdloss.VanillaKD(temperature=2.0, alpha=0.3, causal=True)(student, teacher, LABELS), theirs, student)
    shifted = kdloss.VanillaKD(temperature=2.0, alpha=0.3, causal=False)(s, t, LABELS[:, 1:])
    same(shifted, theirs, student)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalised JSD of log-probabilities, with beta as in GKD."""
    q, p = student.exp(), teacher.exp()
    if beta in (0, 1):
        return (p * (teacher - student) if beta == 0 else q * (student - teacher)).sum(-1)
    m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (teacher - m) + (1 - beta) * q * (student - m)).sum(-1)


def small() -> dict[str, object]:
    """Two small language models and a batch, in float64."""
    models = {"student": build("gpt2", depth=4, seed=1).double(), "teacher": build("gpt2", width=24, depth=8).double()}
    inputs = batch("gpt2")
    return {**models, "batch": inputs, "labels": inputs["labels"]}


def run(names: dict) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of both models at t, and the labels t + 1."""
    plain = {k: v for k, v in names["batch"].items() if k != "labels"}
    with torch.no_grad():
        taught = names["teacher"](**plain).logits
    return *without_last(names["student"](**plain).logits, taught), names["labels"][:, 1:]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trls_loss_equals_that_of_the_page_for_any_beta(beta):
    names = small()
    s, t, labels = run(names)
    theirs = counted(jsd(s.log_softmax(-1), t.log_softmax(-1), beta), labels)
    code = block("TRL", **names)
    code.criterion.terms["kd"].divergence = partial(code.criterion.terms["kd"].divergence, beta=beta)
    ours = code.model(**names["batch"]).loss
    same(ours, theirs, names["student"].lm_head.weight, rtol=1e-7)
    if beta == 0.5:
        torch.testing.assert_close(code.loss, theirs)


def test_torchtunes_sum_is_vanilla_kd_of_one_minus_its_ratio_plus_the_teachers_entropy():
    loss, student, teacher = of_page("torchtune")
    s, t, labels = *without_last(student, teacher), LABELS[:, 1:]
    soft = -counted((t.softmax(-1) * s.log_softmax(-1)).sum(-1), labels)
    same(loss + 0.7 * counted(entropy(t), labels), 0.3 * ce(s, labels) + 0.7 * soft, student)


def test_torchtunes_symmetric_kl_is_a_sum_of_two_divergences_plus_the_teachers_entropy():
    loss, student, teacher = of_page("torchtune", 1)
    s, t, labels = *without_last(student, teacher), LABELS[:, 1:]
    soft = -counted((t.softmax(-1) * s.log_softmax(-1)).sum(-1), labels)
    theirs = 0.3 * soft + 0.7 * counted(kl(t, s), labels)
    same(loss + 0.3 * counted(entropy(t), labels), theirs, student)


def test_our_loss_is_zero_without_counted_labels():
    student, teacher = logits()
    criterion = 0.5 * kdloss.Logits(divergences.reverse_kl) + 0.5 * kdloss.CrossEntropy()
    assert criterion(student, teacher, torch.full_like(LABELS, -100)) == 0


def test_nemo_automodel_divides_t_squared_kl_by_the_number_of_labels_of_the_full_batch():
    loss, student, teacher = of_page("NeMo AutoModel")
    entries = F.cross_entropy(student.flatten(0, 1), LABELS.flatten(), reduction="sum")
    taught = 4 * kl(student, teacher, 2.0)[COUNTED].sum()
    same(loss, 0.3 * entries / 20 + 0.7 * taught / 20, student)


def test_ligers_fused_head_equals_the_lazy_head_of_the_page():
    names = small()
    names["batch"] = {k: v for k, v in names["batch"].items() if k != "attention_mask"}
    s, t, labels = run(names)
    log_q, log_p = (s / 2.0).log_softmax(-1), (t / 2.0).log_softmax(-1)
    theirs = 0.5 * ce(s, labels) + 0.5 * counted(jsd(log_q, log_p, 0.5), labels)
    same(block("Liger Kernel", **names).loss, theirs, names["student"].lm_head.weight, rtol=1e-6)


def test_ligers_losses_of_flat_logits_differ_from_ours_by_the_factors_of_the_page():
    student, teacher = logits(B * T, V)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    for beta in (0.0, 0.3, 1.0):
        same(divergences.jsd(student, teacher, beta=beta).mean(), jsd(log_q, log_p, beta).sum() / (B * T), student)
        same(divergences.jsd(log_q, log_p, beta=beta).mean(), jsd(log_q, log_p, beta).sum() / (B * T), student)
    summed = (log_p.exp() * (log_p - log_q)).sum()
    same(divergences.forward_kl(student, teacher).mean(), summed / (B * T), student)
    same(divergences.forward_kl(student, teacher).mean() / V, summed / (B * T * V), student)
    varied = 0.5 * (log_q.exp() - log_p.exp()).abs().sum() / (B * T)
    same(divergences.total_variation(student, teacher).mean(), varied, student)


def test_different_vocabularies_that_liger_would_pad_are_refused():
    student, _ = logits()
    with pytest.raises(ValueError, match="truncate"):
        divergences.forward_kl(student, torch.zeros(B, T, V + 1).double())


def test_distillkits_kl_is_ours_without_the_causal_shift():
    student, teacher = logits()
    ours = kdloss.Sum(1.0 * kdloss.Logits(temperature=2.0), causal=False)
    same(ours(student, teacher, LABELS), 4 * (kl(student, teacher, 2.0) * COUNTED).sum() / COUNTED.sum(), student)


def test_distillkits_weights_that_sum_to_one_give_the_vanilla_kd_of_the_page():
    names = small()
    s, t, labels = run(names)
    theirs = (0.5 * ce(s, labels) + 0.5 * 4 * counted(kl(s, t, 2.0), labels)) / (0.5 + 0.5)
    same(block("DistillKit", **names).loss, theirs, names["student"].lm_head.weight, rtol=1e-6)


@pytest.mark.parametrize("missing", ["zero", "symmetric_uniform"])
def test_distillkits_missing_probability_is_a_tail_of_top_k_logits(missing):
    student, teacher = logits()
    kept = teacher.topk(4)
    if missing == "zero":
        loss = block("DistillKit", 1, student_logits=student, teacher_logits=teacher).loss
        log_p = kept.values.log_softmax(-1)
    else:
        top = kdloss.TopKLogits.of(teacher, k=4)
        loss = kdloss.VanillaKD(temperature=1.0, alpha=0.5, causal=True)(student, top, LABELS)
        log_p = teacher.log_softmax(-1).gather(-1, kept.indices)
    log_q = student.log_softmax(-1).gather(-1, kept.indices)
    values = (log_p.exp() * (log_p - log_q)).sum(-1)
    if missing == "symmetric_uniform":
        rests = [1 - x.exp().sum(-1) for x in (log_p, log_q)]
        values = values + rests[0] * (rests[0] / rests[1]).log()
    v, s, labels = values[:, :-1], student[:, :-1], LABELS[:, 1:]
    same(loss, 0.5 * ce(s, labels) + 0.5 * counted(v, labels), student, rtol=1e-6)


def test_distillkits_first_script_divides_by_examples_and_length():
    student, teacher = logits()
    theirs = F.kl_div(*probabilities(student, teacher, 2.0), reduction="batchmean") * 4 / T
    ours = 1.0 * kdloss.Logits(temperature=2.0, positions="mask")
    same(ours(student, teacher, LABELS), theirs, student)


@pytest.mark.parametrize("title", ["torchdistill", "mdistiller and RepDistiller"])
def test_the_loss_of_the_page_is_cross_entropy_plus_t_squared_kl(title):
    loss, student, teacher = of_page(title)
    same(loss, 0.1 * ce(student, LABELS) + 0.9 * 16 * counted(kl(student, teacher, 4.0), LABELS), student)


def test_textbrewers_soft_cross_entropy_is_the_loss_of_the_page_plus_the_teachers_entropy():
    loss, student, teacher = of_page("TextBrewer")
    log_q, p = probabilities(student, teacher, 8.0)
    soft = -counted((p * log_q).sum(-1), LABELS)
    theirs = 0.5 * ce(student, LABELS) + soft
    same(loss + counted(entropy(teacher, 8.0), LABELS), theirs, student)
    mse = ((student - teacher) / 8.0).square().mean()
    same(divergences.logit_mse(student, teacher).mean() / 64, mse, student)


def features(*shape: int) -> tuple[Tensor, Tensor]:
    """Random features of a student and a teacher."""
    return logits(*shape)


def test_textbrewers_fsp_is_a_mean_over_the_matrix():
    student, teacher = features(3, 6, 10)
    early, late = ([x[..., :4] for x in (student, teacher)], [x[..., 4:] for x in (student, teacher)])
    grams = [a.mT @ b / 6 for a, b in zip(early, late, strict=True)]
    ours = distances.fsp(student, teacher, split=4).mean() / (4 * 6)
    same(ours, F.mse_loss(*grams), student)


def features_criterion(distance: object, count: int = 3) -> kdloss.Sum:
    """A criterion: the mean of one distance over `count` layers."""
    return 1.0 * kdloss.Features([f"layer{i}" for i in range(count)], pairing="same", distance=distance)


class Stages(torch.nn.Module):
    """A model whose modules return these tensors."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs
        for name in outputs:
            self.add_module(name, torch.nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for name, value in self.outputs.items():
            self.get_submodule(name)(value)
        return x


def of_stages(distance: object, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """The value of the page's term for three stages."""
    sides = [Stages(**{f"layer{i}": x for i, x in enumerate(values)}) for values in (students, teachers)]
    found: Tensor = kdloss.Distiller(sides[1], features_criterion(distance))(
        sides[0], torch.zeros(len(students[0]), 3)
    ).loss
    return found


@pytest.mark.parametrize("name", ["attention_transfer", "nst"])
def test_a_sum_over_stages_is_the_mean_of_the_page_times_the_number_of_stages(name):
    sizes = [(4, 6), (5, 4), (6, 2)]
    pairs = [features(3, c, n, n) for c, n in sizes]
    students, teachers = ([pair[i] for pair in pairs] for i in range(2))

    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.square().mean(1).flatten(1))

    def kernels(a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.normalize(x.flatten(2), dim=2) for x in (a, b))
        return (a @ b.mT).square().mean()

    if name == "nst":
        values = [kernels(s, s) + kernels(t, t) - 2 * kernels(s, t) for s, t in pairs]
    else:
        values = [(attention(s) - attention(t)).square().mean() for s, t in pairs]
    ours = 3 * of_stages(getattr(distances, name), students, teachers)
    for student in students:
        same(ours, sum(values), student, rtol=1e-7)


def test_mdistillers_decoupled_loss_is_ours():
    student, teacher = logits(6, V)
    labels = torch.arange(6) % V
    own = F.one_hot(labels, V).bool()
    q, p = (student / 4).softmax(-1), (teacher / 4).softmax(-1)
    two = [torch.stack([x[own], x.masked_fill(own, 0).sum(-1)], -1) for x in (q, p)]
    target = F.kl_div(two[0].log(), two[1], reduction="sum") * 16 / 6
    other = F.kl_div(
        (student / 4 - 1000.0 * own).log_softmax(-1), (teacher / 4 - 1000.0 * own).softmax(-1), reduction="sum"
    )
    ours = 1.0 * kdloss.Logits(partial(divergences.dkd, alpha=1.0, beta=8.0), temperature=4.0)
    same(ours(student, teacher, labels), 1.0 * target + 8.0 * other * 16 / 6, student)


def test_losses_on_relations_between_images_are_ours_without_a_factor():
    student, teacher = features(6, 5)

    def of(loss: object) -> Tensor:
        return loss(student, teacher).mean()

    grams = [F.normalize(x @ x.T) for x in (student, teacher)]
    same(of(distances.similarity), (grams[1] - grams[0]).square().sum() / 36, student)

    far = [torch.cdist(x, x) for x in (student, teacher)]
    apart = [x / x[~torch.eye(6, dtype=torch.bool)].mean() for x in far]
    same(of(distances.rkd_distance), F.smooth_l1_loss(*apart), student)

    corners = [F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2) for x in (student, teacher)]
    same(of(distances.rkd_angle), F.smooth_l1_loss(*(x @ x.mT for x in corners)), student)

    near = [(F.normalize(x) @ F.normalize(x).T + 1) / 2 for x in (student, teacher)]
    q, p = (x / x.sum(1, keepdim=True) for x in near)
    same(of(distances.pkt), (p * ((p + 1e-7) / (q + 1e-7)).log()).mean(), student, rtol=1e-4)

    same(of(distances.mse), F.mse_loss(student, teacher), student)


def test_vid_is_the_mean_negative_log_likelihood_of_a_gaussian_with_variance_five():
    student, teacher = features(6, 5)
    variance = torch.full((5,), 5.0, dtype=torch.float64)
    theirs = 0.5 * ((student - teacher) ** 2 / variance + variance.log())
    same(distances.VID(5, 5).double()(student, teacher).mean(), theirs.mean(), student, rtol=1e-6)


def test_timms_loss_is_that_of_the_page_and_deits_is_also_divided_by_the_number_of_classes():
    loss, student, teacher = of_page("timm and DeiT")
    task, taught = ce(student, LABELS), 16 * counted(kl(student, teacher, 4.0), LABELS)
    same(loss, 0.3 * task + 0.7 * taught, student)

    rows, teacher = logits(6, V)
    labels = torch.arange(6) % V
    log_q, p = probabilities(rows, teacher, 3.0)
    soft = F.kl_div(log_q, p, reduction="sum") * 9 / rows.numel()
    ours = 0.4 * kdloss.CrossEntropy() + 0.6 / V * kdloss.Logits(temperature=3.0)
    same(ours(rows, teacher, labels), 0.4 * F.cross_entropy(rows, labels) + 0.6 * soft, rows)


def test_the_expressions_in_the_tables_of_the_page_can_be_evaluated():
    given = dict.fromkeys(("beta", "gamma", "alpha", "kd_ratio", "task_loss_weight", "a", "w"), 0.5)
    given |= dict.fromkeys(("temperature", "T", "tau"), 2.0)
    given |= {
        "name": "layer2",
        "stages": ["layer1", "layer2"],
        "partial": partial,
        "s": torch.zeros(3),
        "t": torch.ones(3),
    }
    names = {**vars(kdloss), **vars(divergences), **vars(distances), **given}
    written = 0
    for table in re.findall(r"((?:^\|.*\n)+)", PAGE, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
        ours = [i for i, cell in enumerate(head) if cell in ("you write", "here")]
        for row, i in ((row, i) for row in rows for i in ours):
            for code in re.findall(r"`([^`]+)`", row[i]):
                if not re.match(r"\w+=", code):  # an option without its call can't be evaluated
                    eval(code, names)
                    written += 1
    assert written > 40
