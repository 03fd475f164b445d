"""The recipes of docs/recipes_images.md have the values and gradients of the papers' formulas, written out here."""

import re
from functools import partial
from types import SimpleNamespace

import oracles
import pytest
import torch
import torch.nn.functional as F
from readme import ROOT, recipe
from torch import nn

from kdloss import CrossEntropy, Distillation

B, CLASSES, EPOCH = 6, 5, 782
LABELS = torch.arange(B) % CLASSES
page = partial(recipe, "recipes_images.md")


class Constant(nn.Module):
    """A module whose features are a parameter, so that features have gradients in `model.parameters()`."""

    def __init__(self, shape):
        super().__init__()
        self.features = nn.Parameter(torch.randn(B, *shape, dtype=torch.float64))

    def forward(self, _):
        return self.features


class Net(nn.Module):
    """Modules of these names that return features of these shapes, and a module "fc" that returns logits."""

    def __init__(self, logits=(CLASSES,), **shapes):
        super().__init__()
        self.names = [*shapes, "fc"]
        for name, shape in {**shapes, "fc": logits}.items():
            *folders, last = name.split(".")
            place = self
            for folder in folders:
                if folder not in place._modules:
                    place.add_module(folder, nn.Module())
                place = place.get_submodule(folder)
            place.add_module(last, Constant(shape))

    def forward(self, images, labels=None):
        return [self.get_submodule(name)(images) for name in self.names][-1]

    def __getitem__(self, name):
        return self.get_submodule(name).features


def stages(*widths, sizes=((8, 8), (4, 4), (2, 2)), pooled=(1, 1)):
    """Three feature maps, and pooled features: 1x1 maps as in torchvision, or vectors."""
    maps = {f"layer{i + 1}": (w, *size) for i, (w, size) in enumerate(zip(widths, sizes, strict=True))}
    return Net(**maps, avgpool=(widths[-1], *pooled))


def pair(**shapes):
    """A student and a wider teacher."""
    return stages(4, 6, 8, **shapes), stages(5, 7, 9, **shapes)


def assert_matches(criterion, paper, student, teacher, *, step=0, labels=LABELS):
    """The criterion's loss and all gradients equal those of `paper`, the paper's formula on both models."""
    images = torch.zeros(B, 3, 8, 8, dtype=torch.float64)
    teachers = list(teacher) if isinstance(teacher, nn.ModuleList) else teacher
    model = Distillation(student, teachers, criterion).prepare(images).double()
    model.criterion.step = step
    losses, slopes = [], []
    for loss in (lambda: model(images, labels=labels).loss, lambda: paper(student, teacher.requires_grad_(False))):
        torch.manual_seed(7)
        losses.append(loss())
        slopes.append(torch.autograd.grad(losses[-1], [*model.parameters()], allow_unused=True))
    assert losses[1] > 0
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    for (name, p), got, expected in zip(model.named_parameters(), *slopes, strict=True):
        zero = torch.zeros_like(p)
        sides = (zero if slope is None else slope for slope in (got, expected))
        torch.testing.assert_close(*sides, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    assert sum(slope is not None and bool(slope.any()) for slope in slopes[1]) > 0


def trained(criterion, name="feature"):
    """The projections and the distances of a term, by layer."""
    term = criterion.terms[name]
    return term.projections, term.distances


def ce(model):
    return F.cross_entropy(model["fc"], LABELS)


def log_probs(temperature, *models):
    return (torch.log_softmax(model["fc"] / temperature, 1) for model in models)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(1)


# -- predictions --


def test_kd_weighs_cross_entropy_by_0_1_and_kl_at_temperature_4_by_0_9():
    def paper(s, t):
        log_q, log_p = log_probs(4, s, t)
        return 0.1 * ce(s) + 0.9 * 16 * kl(log_p, log_q).mean()

    assert_matches(page("KD").criterion, paper, Net(), Net())


def test_ca_mkd_weighs_each_teacher_by_its_cross_entropy():
    student, *teachers = (Net() for _ in range(4))

    def paper(s, _):
        losses = torch.stack([F.cross_entropy(t["fc"].detach(), LABELS, reduction="none") for t in teachers])
        w = (1 - losses.exp() / losses.exp().sum(0)) / 2
        log_q, *log_ps = log_probs(4, s, *teachers)
        return ce(s) + sum(w[k] * 16 * kl(p.detach(), log_q) for k, p in enumerate(log_ps)).mean()

    assert_matches(page("CA-MKD").criterion, paper, student, nn.ModuleList(teachers))


def test_mse_compares_only_the_logits():
    assert_matches(page("MSE").criterion, lambda s, t: (s["fc"] - t["fc"]).square().mean(), Net(), Net())


@pytest.mark.parametrize(("step", "weight"), [(0, 0), (5 * EPOCH, 0.25), (20 * EPOCH, 1), (30 * EPOCH, 1)])
def test_dkd_warms_up_over_twenty_epochs(step, weight):
    def paper(s, t):
        q, p = (x.exp() for x in log_probs(4, s, t))
        is_label = F.one_hot(LABELS, CLASSES).bool()
        binary = [torch.stack([x[is_label], 1 - x[is_label]], 1) for x in (p, q)]
        others = [x[~is_label].view(B, -1) / (1 - x[is_label].unsqueeze(1)) for x in (p, q)]
        target, non_target = (kl(*(x.log() for x in both)).mean() for both in (binary, others))
        return ce(s) + weight * 16 * (target + 8 * non_target)

    assert_matches(page("DKD").criterion, paper, Net(), Net(), step=step)


def test_nkd_weighs_the_label_by_the_teachers_probability_and_the_other_classes_by_1_5():
    def paper(s, t):
        log_q, log_p = log_probs(1, s, t)
        is_label = F.one_hot(LABELS, CLASSES).bool()
        others = [torch.log_softmax(x["fc"][~is_label].view(B, -1), 1) for x in (t, s)]
        soft_label = -(log_p[is_label].exp() * log_q[is_label]).mean()
        non_target = -(others[0].exp() * others[1]).sum(1).mean()
        entropy = -(others[0].exp() * others[0]).sum(1).mean()  # our KL divergence leaves it out
        return ce(s) + soft_label + 1.5 * (non_target - entropy)

    assert_matches(page("NKD").criterion, paper, Net(), Net())


def test_dist_weighs_correlations_of_images_and_of_classes_by_2():
    def off(a, b):
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()

    def paper(s, t):
        q, p = (x.exp() for x in log_probs(1, s, t))
        return ce(s) + 2 * (off(q, p) + off(q.T, p.T))

    assert_matches(page("DIST").criterion, paper, Net(), Net())


def test_lskd_weighs_kl_by_9_at_a_base_temperature_of_2():
    def paper(s, t):
        z = ((x["fc"] - x["fc"].mean(1, keepdim=True)) / x["fc"].std(1, keepdim=True) for x in (t, s))
        return 0.1 * ce(s) + 9 * 4 * kl(*(torch.log_softmax(x / 2, 1) for x in z)).mean()

    assert_matches(page("LSKD").criterion, paper, Net(), Net())


def test_ttm_raises_the_teachers_probabilities_to_the_power_of_0_1():
    def paper(s, t):
        power = t["fc"].softmax(1) ** 0.1
        target = power / power.sum(1, keepdim=True)
        return ce(s) + 45 * kl(target.log(), next(log_probs(1, s))).mean()

    assert_matches(page("TTM").criterion, paper, Net(), Net())


def test_abkd_has_a_weight_of_32_and_no_factor_of_temperature():
    def paper(s, t):
        q, p = (x.exp() for x in log_probs(4, s, t))
        a, b = 0.8, 0.3
        each = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return ce(s) - 32 / (a * b) * each.sum(1).mean()

    assert_matches(page("ABKD").criterion, paper, Net(), Net())


def test_wkd_weighs_the_label_by_the_teacher_and_moves_mass_at_the_cosine_costs_of_its_classifier():
    classifier, (student, teacher) = torch.randn(CLASSES, 64, dtype=torch.float64), (Net(), Net())
    criterion = page("WKD").wkd(classifier)
    cost = torch.stack([1 - F.cosine_similarity(row, classifier) for row in classifier]).fill_diagonal_(0)
    logits = [model["fc"].detach().numpy() for model in (student, teacher)]
    moved = oracles.sinkhorn(*logits, 8.0, 0.05, cost.numpy(), steps=2000).mean() / 8**2
    log_q, log_p = (x[torch.arange(B), LABELS] for x in log_probs(1, student, teacher))
    expected = ce(student) - (log_p.exp() * log_q).mean() + 600 * moved
    value = criterion(student["fc"], teacher["fc"], LABELS)
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)  # the recipe stops after 100 iterations
    assert 600 * moved > 0.01 * value


@pytest.mark.parametrize(("step", "reversal"), [(0, 0.0), (5 * EPOCH, 0.5), (10 * EPOCH, 1.0), (99 * EPOCH, 1.0)])
def test_ctkd_reverses_the_gradient_of_its_temperature_by_a_growing_factor(step, reversal):
    criterion = page("CTKD").criterion

    def paper(s, t):
        theta = criterion.terms["kd"].theta
        temperature = 1 + 20 / (1 + torch.exp(-theta))
        log_p, log_q = ((x["fc"] / temperature).log_softmax(1) for x in (t, s))
        theta.register_hook(lambda slope: -reversal * slope)
        return 0.1 * ce(s) + 0.9 * (temperature**2 * kl(log_p, log_q)).mean()

    assert_matches(criterion, paper, Net(), Net(), step=step)


def test_ctkd_saves_its_step_and_its_temperature():
    assert set(page("CTKD").criterion.state_dict()) >= {"terms.kd.theta", "step"}


# -- feature maps --


def test_fitnets_has_a_weight_of_100_and_a_regressor_with_batch_normalisation():
    criterion = page("FitNets").criterion

    def paper(s, t):
        conv, norm, _ = trained(criterion)[0]["layer2"]
        gap = F.relu(normalised(one_by_one(s["layer2"], conv), norm)) - t["layer2"]
        return ce(s) + 100 * gap.square().mean()

    assert_matches(criterion, paper, *pair())


def one_by_one(x, conv):
    """The output of a 1x1 convolution."""
    out = torch.einsum("bchw,dc->bdhw", x, conv.weight[:, :, 0, 0])
    return out if conv.bias is None else out + conv.bias[:, None, None]


def normalised(x, norm):
    """The output of batch normalisation in training."""
    mean, variance = (f(x, (0, 2, 3), keepdim=True) for f in (torch.mean, partial(torch.var, correction=0)))
    scale, shift = (p[:, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / (variance + norm.eps).sqrt() * scale + shift


def test_attention_transfer_has_a_weight_of_1000_for_each_stage():
    def attention(x):
        return F.normalize(x.square().mean(1).flatten(1), dim=1)

    def paper(s, t):
        gaps = (attention(s[f"layer{i}"]) - attention(t[f"layer{i}"]) for i in (1, 2, 3))
        return ce(s) + 1000 * sum(gap.square().mean() for gap in gaps)

    assert_matches(page("AT").criterion, paper, *pair())


def test_neuron_selectivity_has_a_weight_of_50_for_each_stage():
    def kernel(x, y):
        x, y = (F.normalize(z.flatten(2), dim=2) for z in (x, y))
        return torch.einsum("bcn,bdn->bcd", x, y).square().mean()

    def paper(s, t):
        sides = [(s[f"layer{i}"], t[f"layer{i}"]) for i in (1, 2, 3)]
        return ce(s) + 50 * sum(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) for x, y in sides)

    assert_matches(page("NST").criterion, paper, *pair())


def test_flow_of_the_solution_procedure_compares_one_matrix_per_stage_and_sums_over_stages():
    def flow(model, i):
        early, late = (model[f"layer{i}.{k}"].flatten(2) for k in (0, 2))
        return torch.einsum("bcn,bdn->bcd", early, late) / early.shape[-1]

    def paper(s, t):
        return sum((flow(s, i) - flow(t, i)).square().sum((1, 2)).mean() for i in (1, 2, 3))

    shapes = {f"layer{i}.{k}": (2 * i, 8 // i, 4) for i in (1, 2, 3) for k in (0, 2)}
    assert_matches(page("FSP").criterion, paper, Net(**shapes), Net(**shapes))


def test_activation_boundary_has_a_weight_of_0_003_that_is_halved_for_each_earlier_stage():
    sizes = ((32, 32), (16, 16), (8, 8))
    criterion = page("AB").criterion

    def paper(s, t):
        total = 0.0
        for i in (1, 2, 3):
            conv, norm = trained(criterion)[0][f"layer{i}"]
            x, y = normalised(one_by_one(s[f"layer{i}"], conv), norm), t[f"layer{i}"]
            below, above = (x + 1).square() * ((x > -1) & (y <= 0)), (x - 1).square() * ((x <= 1) & (y > 0))
            total = total + (below + above).sum() / B * 2.0 ** (i - 3)
        return 3 / 1000 * total

    assert_matches(criterion, paper, stages(2, 2, 2, sizes=sizes), stages(64, 128, 256, sizes=sizes))


def test_variational_information_has_a_weight_of_1_for_each_stage():
    criterion = page("VID").criterion

    def paper(s, t):
        total = ce(s)
        for i in (1, 2, 3):
            first, _, second, _, third = trained(criterion)[0][f"layer{i}"]
            mean = one_by_one(F.relu(one_by_one(F.relu(one_by_one(s[f"layer{i}"], first)), second)), third)
            alpha = trained(criterion)[1][f"layer{i}"].alpha[:, None, None]
            variance = torch.log(1 + torch.exp(alpha)) + 1e-5
            total = total + 0.5 * ((mean - t[f"layer{i}"]).square() / variance + variance.log()).mean()
        return total

    assert_matches(criterion, paper, *pair())
    assert len([*criterion.parameters()]) == 3 * (3 + 1), "three convolutions and variances for each stage"
    alpha = trained(criterion)[1]["layer1"].alpha
    torch.testing.assert_close(torch.log(1 + torch.exp(alpha)) + 1e-5, torch.full_like(alpha, 5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("teacher_width", [4, 6])
def test_mgd_sums_over_levels_the_errors_of_features_generated_from_35_percent_of_the_positions(teacher_width):
    sizes = [(8, 6), (4, 3), (2, 2), (2, 1), (1, 1)]
    shapes = [{f"neck.fpn_convs.{i}.conv": (w, *size) for i, size in enumerate(sizes)} for w in (4, teacher_width)]
    criterion = page("MGD").criterion

    def paper(s, t):
        total = s(None).loss
        for i, (h, w) in enumerate(sizes):
            projections, distances = trained(criterion)
            x, y = (model[f"neck.fpn_convs.{i}.conv"] for model in (s, t))
            align, layer = f"neck/fpn_convs/{i}/conv", distances[f"neck/fpn_convs/{i}/conv"]
            if align in projections:
                x = F.linear(x.movedim(1, 3), *projections[align].parameters()).movedim(3, 1)
            x = x * (torch.rand(B, h * w).view(B, 1, h, w) >= 0.65)
            new = F.conv2d(
                F.relu(F.conv2d(x, *layer.first.parameters(), padding=1)), *layer.second.parameters(), padding=1
            )
            total = total + 2e-5 * (new - y).square().sum() / B
        return total

    assert_matches(criterion, paper, Detector(**shapes[0]), Detector(**shapes[1]))


class Detector(Net):
    """A model that returns its own loss."""

    def forward(self, images, labels=None):
        logits = super().forward(images)
        return SimpleNamespace(logits=logits, loss=logits.square().mean())


def test_channel_wise_distillation_has_a_weight_of_3_and_counts_all_pixels():
    labels = torch.randint(0, CLASSES, (B, 6, 8))
    labels[0, :, :5] = labels[2, 1:] = 255

    def paper(s, t):
        log_q, log_p = (torch.log_softmax(x["head"].flatten(2) / 4, 2) for x in (s, t))
        divergence = 16 * (log_p.exp() * (log_p - log_q)).sum() / (B * CLASSES)
        return F.cross_entropy(s["fc"], labels, ignore_index=255) + 3 * divergence

    nets = (Net(logits=(CLASSES, 6, 8), head=(CLASSES, 3, 4)) for _ in "st")
    assert_matches(page("CWD").criterion, paper, *nets, labels=labels)


@pytest.mark.parametrize(("step", "weight"), [(0, 0), (5 * EPOCH, 1.25), (20 * EPOCH, 5)])
@pytest.mark.parametrize("other_widths", [False, True])
def test_review_fuses_deeper_stages_into_earlier_ones_and_compares_them_at_several_sizes(step, weight, other_widths):
    made, layers = page("ReviewKD"), ["layer1", "layer2", "layer3", "avgpool"]
    criterion, models = made.criterion, [stages(64, 128, 256) for _ in "st"]
    if other_widths:
        *_, warmup = criterion.weights["review"].factors
        review = made.Review(layers, [4, 6, 8, 8], [5, 7, 9, 9], middle=3)
        criterion, models = CrossEntropy() + warmup * review, pair()
    review = criterion.terms["review"]
    assert review.enter[0][0].out_channels == (3 if other_widths else 256)

    def normal(x, block):
        return normalised(F.conv2d(x, block[0].weight, padding=block[0].weight.shape[-1] // 2), block[1])

    def paper(s, t):
        loss, fused = 0.0, None
        for i in (3, 2, 1, 0):
            x = normal(s[layers[i]], review.enter[i])
            if fused is not None:
                times = x.shape[-1] // fused.shape[-1]
                fused = fused.repeat_interleave(times, 2).repeat_interleave(times, 3)
                gate = 1 / (1 + torch.exp(-one_by_one(torch.cat([x, fused], 1), review.gates[i])))
                x = x * gate[:, :1] + fused * gate[:, 1:]
            fused, y, its = x, normal(x, review.leave[i]), t[layers[i]]
            gaps = [(y - its).square().mean()]
            for size in (4, 2, 1):
                if size < y.shape[-1]:
                    cells = y.shape[-1] // size
                    blocks = ((z.unfold(2, cells, cells).unfold(3, cells, cells).mean((-2, -1))) for z in (y, its))
                    gaps.append((next(blocks) - next(blocks)).square().mean())
            shares = [1, 0.5, 0.25, 0.125][: len(gaps)]
            loss = loss + sum(a * b for a, b in zip(shares, gaps, strict=True)) / sum(shares)
        return ce(s) + weight * loss

    assert_matches(criterion, paper, *models, step=step)


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (4, 4)])
def test_simkd_compares_only_the_last_map_at_the_coarser_size_and_reuses_the_teachers_classifier(sizes):
    made = page("SimKD")
    student, teacher = (stages(4, 6, w, sizes=((8, 8), (4, 4), (n, n))) for w, n in zip((8, 10), sizes, strict=True))

    def paper(s, t):
        sides = [s["layer3"], t["layer3"]]
        for i, (own, other) in enumerate((sizes, sizes[::-1])):
            if own > other:
                sides[i] = sides[i].unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
        x, layers = sides[0], trained(made.criterion)[0]["layer3"]
        assert [tuple(conv.weight.shape) for conv in layers[::3]] == [(5, 8, 1, 1), (5, 5, 3, 3), (10, 5, 1, 1)]
        for conv, norm in zip(layers[::3], layers[1::3], strict=True):
            x = F.relu(normalised(F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2), norm))
        return (x - sides[1]).square().mean()

    assert_matches(made.criterion, paper, student, teacher)
    teacher.fc = nn.Linear(10, CLASSES).double()
    used = made.deployed(nn.Identity(), teacher)
    assert torch.equal(used(student["layer3"]), teacher.fc(used[1](student["layer3"]).mean((2, 3))))


# -- relations between images --

either_way = pytest.mark.parametrize("pooled", [(), (1, 1)])


def vectors(model, name):
    return model[name].flatten(1)


def test_similarity_preserving_has_a_weight_of_3000():
    def paper(s, t):
        grams = [F.normalize(x @ x.T, dim=1) for x in (vectors(s, "layer3"), vectors(t, "layer3"))]
        return ce(s) + 3000 * (grams[0] - grams[1]).square().sum() / B**2

    assert_matches(page("SP").criterion, paper, *pair())


@either_way
def test_rkd_weighs_distances_by_25_and_angles_by_50(pooled):
    def relations(x):
        arms = x[None] - x[:, None]
        lengths = arms.square().sum(-1).add(torch.eye(B)).sqrt() * (1 - torch.eye(B))
        sides = F.normalize(arms, dim=-1)
        return lengths / (lengths.sum() / (B * (B - 1))), torch.einsum("ijd,ikd->ijk", sides, sides)

    def paper(s, t):
        (d, a), (e, b) = (relations(vectors(model, "avgpool")) for model in (s, t))
        return ce(s) + 25 * F.smooth_l1_loss(d, e) + 50 * F.smooth_l1_loss(a, b)

    assert_matches(page("RKD").criterion, paper, *pair(pooled=pooled))


@either_way
def test_pkt_has_a_weight_of_30000(pooled):
    def neighbours(x):
        unit = F.normalize(x, dim=1)
        near = (unit @ unit.T + 1) / 2 + 1e-7  # the authors' code adds it inside the logarithm only
        return near / near.sum(1, keepdim=True)

    def paper(s, t):
        q, p = (neighbours(vectors(model, "avgpool")) for model in (s, t))
        return ce(s) + 30000 * (p * (p / q).log()).mean()

    assert_matches(page("PKT").criterion, paper, *pair(pooled=pooled))


@either_way
def test_correlation_congruence_has_a_weight_of_100(pooled):
    def kernel(x):
        cosines = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
        return torch.exp(torch.tensor(-0.8, dtype=torch.float64)) * (1 + 0.8 * cosines + 0.32 * cosines**2)

    def paper(s, t):
        return ce(s) + 100 * (kernel(vectors(s, "avgpool")) - kernel(vectors(t, "avgpool"))).square().sum() / B**2

    assert_matches(page("CC").criterion, paper, *pair(pooled=pooled))


# -- several teachers --


def test_takd_goes_from_teacher_to_assistant_to_student():
    made, models, ran = page("TAKD"), [Net(), Net(), Net()], []
    made.chain(models, ran.append)
    assert [(model.teachers[0].module, model.student) for model in ran] == [tuple(models[:2]), tuple(models[1:])]

    def paper(s, t):
        log_q, log_p = log_probs(5, s, t)
        return 0.5 * ce(s) + 0.5 * 25 * kl(log_p, log_q).mean()

    assert_matches(made.criterion, paper, Net(), Net())


def test_the_table_has_a_row_for_every_recipe_and_a_test_for_every_mark():
    text = (ROOT / "docs" / "recipes_images.md").read_text()
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \|.*\| (.*) \|$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert all(link == name.lower() for name, link, _ in rows)
    tests = "".join((ROOT / "tests" / file).read_text() for file in ("test_recipes_images.py", "test_recipes.py"))
    assert [name for name, _, mark in rows if mark == "✓" and f'page("{name}")' not in tests] == []
