"""`kdloss.suggest`: each rule of the guide, the measured numbers beside it, and the training of suggested criteria."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from families import ResNet, batch, build
from torch import nn

import kdloss
from kdloss import distances
from kdloss.advice.advice import WIDTH, Advice

RESULTS = Path(__file__).parent.parent / "docs" / "results"


class Net(nn.Module):
    """A model of no named family, with a chosen number of parameters."""

    def __init__(self, parameters):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parameters))

    def forward(self, x):
        return x


class Other(Net):
    """A model of another class, which counts as another family."""


# The rules. `Net` is no language model, so only the rules apply to it, not what was measured on text.


@pytest.mark.parametrize(
    ("student", "teacher", "rule", "by_rule"),
    [
        (20, 10, "1 to 1.5", 1.0),
        (10, 10, "1 to 1.5", 1.0),
        (10, 15, "1 to 1.5", 1.0),
        (10, 19, "1 to 1.5", 1.0),
        (10, 20, "2 to 3", 2.0),
        (10, 30, "2 to 3", 2.0),
        (10, 40, "2 to 3", 2.0),
        (10, 41, "4 to 6", 4.0),
        (10, 400, "4 to 6", 4.0),
    ],
)
def test_temperature_depends_on_how_much_smaller_the_student_is(student, teacher, rule, by_rule):
    sizes, models = kdloss.suggest(student, teacher), kdloss.suggest(Net(student), Net(teacher))
    assert (sizes.temperature, models.temperature) == (1.0, by_rule)  # the measured value; the rule's end nearest to it
    for advice in (sizes, models):
        assert f"rule: {rule} for a student" in advice.reasons["temperature"]
        assert "measured on text: 1 " in advice.reasons["temperature"]
        assert advice.smaller == teacher / student


@pytest.mark.parametrize("teacher", [5, 10, 30, 400])
def test_temperature_of_unlike_architectures_does_not_depend_on_their_sizes(teacher):
    advice = kdloss.suggest(Net(10), Other(teacher))
    assert advice.temperature == 7.0
    assert "rule: 7 to 10 for unlike architectures" in advice.reasons["temperature"]
    assert kdloss.suggest(build("llama"), build("gpt2")).temperature == 1.0


@pytest.mark.parametrize(
    ("quality", "task", "rule", "by_rule", "on_text"),
    [
        ("strong", "easy", "0.2 to 0.3 for a strong teacher and an easy task", 0.2, 0.1),
        ("strong", "hard", "0.4 to 0.5 for a strong teacher and a hard task", 0.4, 0.1),
        ("moderate", "easy", "0.5 to 0.6 for a moderate teacher and an easy task", 0.5, 0.5),
        ("moderate", "hard", "0.6 to 0.7 for a moderate teacher and a hard task", 0.6, 0.6),
        ("weak", "easy", "0.7 to 0.9 for a weak teacher and an easy task", 0.9, 0.9),
        ("weak", "hard", "0.7 to 0.9 for a weak teacher and a hard task", 0.9, 0.9),
    ],
)
def test_alpha_depends_on_teacher_and_task(quality, task, rule, by_rule, on_text):
    settings = {"teacher_quality": quality, "task": task}
    models, sizes = kdloss.suggest(Net(10), Net(20), **settings), kdloss.suggest(10, 20, **settings)
    assert (models.alpha, sizes.alpha) == (by_rule, on_text)
    assert f"rule: {rule}; measured" in models.reasons["alpha"] == sizes.reasons["alpha"]


@pytest.mark.parametrize("goal", ["quality", "speed"])
@pytest.mark.parametrize("quality", ["strong", "moderate", "weak"])
def test_alpha_of_features_has_its_own_rule_unless_the_teacher_is_weak(goal, quality):
    advice = kdloss.suggest(10, 20, goal=goal, teacher_quality=quality)
    assert advice.alpha == (0.9 if quality == "weak" else 0.3)
    rule = "0.7 to 0.9 for a weak teacher" if quality == "weak" else "0.2 to 0.4 for features"
    assert f"rule: {rule}" in advice.reasons["alpha"]


def gpt2(**settings):
    return build("gpt2", **settings)


@pytest.mark.parametrize(
    ("pair", "goal", "method", "reason", "warns"),
    [
        (
            "alike",
            "safe",
            "vanilla",
            "rule: features, where architectures are alike; measured on text: vanilla was ahead",
            None,
        ),
        ("alike", "quality", "both", "rule: features and output", None),
        ("alike", "speed", "feature", "rule: features, whose teacher stops early", None),
        ("unlike", "safe", "vanilla", "rule: the output, where architectures are unlike", None),
        ("unlike", "quality", "vanilla", "rule: the output, where architectures are unlike", "unlike families"),
        ("unlike", "speed", "vanilla", "rule: the output, where architectures are unlike", "unlike families"),
        ("blockless", "safe", "vanilla", "rule: the output, where hidden states are out of reach", None),
        ("blockless", "quality", "vanilla", "rule: the output, where hidden states are out of", "no list of blocks"),
        ("sizes", "safe", "vanilla", "rule: features, where architectures are alike", None),
        ("sizes", "quality", "both", "rule: features and output", "nothing tells whether"),
        ("sizes", "speed", "feature", "rule: features, whose teacher stops early", "nothing tells whether"),
    ],
)
def test_method_depends_on_the_goal_and_on_what_can_be_compared(pair, goal, method, reason, warns):
    pairs = {
        "alike": (gpt2(width=16), gpt2(width=24)),
        "unlike": (build("llama", width=16), gpt2(width=24)),
        "blockless": (Net(10), Net(20)),
        "sizes": (10, 20),
    }
    advice = kdloss.suggest(*pairs[pair], goal=goal)
    assert advice.method == method
    assert advice.reasons["method"].startswith(reason)
    assert len(advice.warnings) == (warns is not None)
    assert all(warns in warning for warning in advice.warnings)
    used = {"vanilla": {"temperature"}, "feature": {"layers", "pairing", "distance"}}
    used["both"] = used["vanilla"] | used["feature"]
    named = {"temperature", "layers", "pairing", "distance"}
    assert {name for name in named if getattr(advice, name) is not None} == used[method]
    assert set(advice.reasons) == {"smaller", "method", "alpha"} | used[method]


def test_suggested_features_for_text_are_those_of_the_last_block_layer_normalised():
    for student, teacher in ((gpt2(width=16), gpt2(width=24)), (10, 20)):
        advice = kdloss.suggest(student, teacher, goal="quality")
        chosen = advice.layers, advice.pairing, advice.distance
        assert chosen == ("last", "uniform", distances.layer_norm_mse)
        widths = "where widths differ" if student == 10 else "from 16 to 24"
        assert f"plain mean squared error, after a trained linear map {widths};" in advice.reasons["distance"]
    assert "linear map" not in kdloss.suggest(gpt2(), gpt2(depth=6), goal="quality").reasons["distance"]


def test_suggested_features_for_other_transformers_follow_the_rule():
    advice = kdloss.suggest(build("vit", width=16), build("vit", width=24), goal="speed")
    assert (advice.layers, advice.pairing, advice.distance) == ("auto", "uniform", distances.layer_norm_mse)


def test_feature_maps_are_paired_by_their_resolution():
    for pair in ((ResNet(), ResNet(width=8)), (hf_resnet(8), hf_resnet(16))):
        advice = kdloss.suggest(*pair, goal="speed")
        assert (advice.layers, advice.pairing, advice.distance) == ("auto", "resolution", distances.mse)


def test_a_student_made_of_the_teachers_blocks_is_paired_by_the_blocks_it_kept():
    teacher = gpt2(depth=6)
    advice = kdloss.suggest(kdloss.keep_blocks(teacher, [0, 2, 4]), teacher, goal="quality")
    assert (advice.layers, advice.pairing, advice.distance) == ("auto", "kept", distances.normalized_mse)
    shallow = kdloss.suggest(kdloss.keep_blocks(teacher, [0, 2, 4]), gpt2(depth=4), goal="quality")
    assert shallow.pairing == "uniform"  # this teacher has no block 4: the student was made of another one


# Warnings.


@pytest.mark.parametrize(("teacher", "warned"), [(100, False), (101, True), (1000, True)])
def test_a_student_more_than_ten_times_smaller_gets_a_warning(teacher, warned):
    warnings = kdloss.suggest(10, teacher).warnings
    assert [f"{teacher / 10:.3g} times smaller" in text for text in warnings] == [True] * warned


def test_a_student_larger_than_its_teacher_gets_a_warning():
    (warning,) = kdloss.suggest(30, 10).warnings
    assert warning.startswith("the student is 3 times as large as the teacher")
    assert not kdloss.suggest(10, 10).warnings


def of_vocabulary(size):
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=size))


def classifier(labels):
    return hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                      num_labels=labels)
    )  # fmt: skip


def test_the_warning_about_different_vocabularies_names_the_solutions():
    (warning,) = kdloss.suggest(of_vocabulary(50), of_vocabulary(60)).warnings
    assert warning.startswith("the student predicts 50 tokens and the teacher 60")
    (of_classes,) = kdloss.suggest(classifier(3), classifier(4)).warnings
    assert of_classes.startswith("the student predicts 3 classes and the teacher 4")
    assert "kdloss.TokenMap.of(student.config.label2id, teacher.config.label2id)" in of_classes
    for text in (warning, of_classes):
        assert all(solution in text for solution in ("kdloss.truncate", "kdloss.TokenMap.of", "kdloss.divergences.uld"))
    resized = of_vocabulary(50)
    resized.resize_token_embeddings(60)
    assert not kdloss.suggest(resized, of_vocabulary(60)).warnings


def test_the_solutions_named_by_the_warning_train():
    student, teacher = of_vocabulary(50), of_vocabulary(60)
    advice = kdloss.suggest(student, teacher)
    tokens = torch.arange(12).view(2, 6)
    for solution in ({"vocabulary": kdloss.truncate}, {"divergence": kdloss.divergences.uld}):
        one_step(student, teacher, advice.criterion(**solution), input_ids=tokens, labels=tokens)


# Families.


def test_families_are_alike_if_one_name_contains_the_other():
    pairs = {("bert", "distilbert"): True, ("roberta", "bert"): True, ("llama", "gpt2"): False, ("bert", "gpt2"): False}
    for (student, teacher), alike in pairs.items():
        reason = kdloss.suggest(build(student), build(teacher)).reasons["smaller"]
        assert ("are alike" if alike else "are unlike") in reason
        assert student in reason
        assert teacher in reason


def test_models_without_a_family_name_are_compared_by_their_class_or_that_of_their_blocks():
    class Deeper(nn.Module):
        """Blocks of ResNet's class."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(copy.deepcopy(ResNet().layer3))

    def verdict(student, teacher):
        return kdloss.suggest(student, teacher).reasons["smaller"].partition("; ")[2]

    assert verdict(ResNet(), ResNet((3, 3))) == verdict(Deeper(), ResNet()) == "architectures are alike"
    assert verdict(ResNet(), Net(9)) == "architectures are unlike"
    assert verdict(gpt2(), ResNet()) == "architectures are unlike (gpt2)"
    linear = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert verdict(linear, nn.Sequential(nn.Linear(3, 2))) == "whether architectures are alike is not known"


def test_a_wrapped_model_gets_the_advice_for_the_model_inside():
    student, teacher = gpt2(width=16), gpt2(width=24)
    wrapped = nn.Module()
    wrapped.module = student  # as in DistributedDataParallel
    expected = kdloss.suggest(student, teacher, goal="quality")
    assert kdloss.suggest(wrapped, torch.compile(teacher), goal="quality") == expected


# Sizes.


def test_tied_weights_count_once_and_every_expert_of_a_mixture_counts():
    tied = of_vocabulary(50)
    block = 4 * 8 * 8 + 4 * 8 + 2 * 4 * 8 * 8 + 5 * 8 + 4 * 8  # attention, its biases, the MLP, its biases, two norms
    assert size(tied) == 50 * 8 + 1024 * 8 + block + 2 * 8
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.MixtralConfig(**sizes, vocab_size=9, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=1)
    experts, router, attention, norms = 4 * 3 * 8 * 16, 4 * 8, 4 * 8 * 8, 2 * 8
    assert size(hf.MixtralForCausalLM(config)) == experts + router + attention + norms + 2 * 9 * 8 + 8


class Packed(nn.Module):
    """A linear layer with two weights in each byte, in a parameter as in bitsandbytes or in a buffer as in GPTQ."""

    def __init__(self, in_features, out_features, buffer):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bytes_ = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        if buffer:
            self.register_buffer("qweight", bytes_)
        else:
            self.weight = nn.Parameter(bytes_, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features))


@pytest.mark.parametrize("buffer", [False, True])
def test_a_quantised_layer_has_the_size_of_the_layer_it_represents(buffer):
    plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    packed = nn.Sequential(Packed(8, 6, buffer), nn.ReLU(), nn.Linear(6, 4))
    assert size(packed) == size(plain) == 8 * 6 + 6 + 6 * 4 + 4
    wrapper = nn.Module()  # like a layer of peft
    wrapper.in_features, wrapper.out_features, wrapper.base_layer = 8, 6, Packed(8, 6, buffer)
    wrapper.adapter = nn.Linear(8, 2)
    assert size(wrapper) == 8 * 6 + 6 + 8 * 2 + 2


def test_a_parametrized_weight_counts_once():
    assert size(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))) == 4 * 4 + 4


def test_a_size_may_be_any_kind_of_number():
    assert kdloss.suggest(np.int64(4), np.float32(9)).smaller == 2.25


def size(model):
    reason = kdloss.suggest(model, 1).reasons["smaller"]
    return int(re.match(r"([\d,]+) parameters", reason)[1].replace(",", ""))


def test_a_graph_has_a_size_and_no_blocks():
    graph = torch.jit.trace(ResNet().eval(), torch.randn(2, 3, 8, 8))
    advice = kdloss.suggest(ResNet(), graph, goal="quality")
    assert (advice.method, advice.smaller) == ("vanilla", 1.0)
    assert advice.reasons["smaller"].endswith("whether architectures are alike is not known")


def test_suggest_does_not_change_the_models():
    student, teacher = gpt2(width=16).train(), gpt2(width=24).eval()
    before = copy.deepcopy(student.state_dict())
    with torch.device("meta"):
        huge = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2))
    kdloss.suggest(student, huge, goal="quality")
    assert student.training
    assert not teacher.training
    assert all(torch.equal(a, before[name]) for name, a in student.state_dict().items())


# Measured numbers.


def perplexity(study, row):
    """The perplexity of a row in a table of docs/results, rounded."""
    return cell(study, row, 2)


def cell(study, row, column):
    (line,) = (x for x in (RESULTS / f"{study}.md").read_text().splitlines() if x.startswith(f"| {row} "))
    number = float(re.match(r" *-?([\d.]+)", line.split("|")[column])[1])
    return str(int(number + 0.5))


@pytest.mark.parametrize(
    ("name", "settings", "study", "rows"),
    [
        ("method", {}, "demo", "feature; vanilla"),
        ("method", {"goal": "quality"}, "smollm2-20-little", "both; vanilla"),
        ("method", {"goal": "quality"}, "smollm2-15-little", "both; vanilla"),
        ("method", {"goal": "speed"}, "demo", "feature; vanilla"),
        ("temperature", {}, "output", "*temperature 0.5; vanilla; *temperature 2; *temperature 4; *temperature 8"),
        ("temperature", {}, "gap", "vanilla; *temperature 2; *temperature 4; *temperature 8"),
        ("temperature", {}, "unlike", "vanilla; *temperature 2; *temperature 4; *temperature 8"),
        ("method", {}, "unlike", "none; vanilla; feature"),
        ("alpha", {}, "output", "*alpha 0; vanilla; *alpha 0.3; *alpha 0.5"),
        ("alpha", {"teacher_quality": "weak"}, "weak-teacher", "*alpha 0.9; none"),
        ("alpha", {"goal": "quality"}, "features", "*alpha 0.1; feature; *alpha 0.5; *alpha 0.7"),
        ("layers", {"goal": "quality"}, "features", "*layers last; *layers late; feature; *layers all; *layers key"),
        ("pairing", {"goal": "quality"}, "features", "*pairing random; *pairing same"),  # the lowest and the highest
        ("distance", {"goal": "quality"}, "features", "feature; *distance mse; *distance cosine; *distance norm"),
    ],
)
def test_the_measured_numbers_in_the_reasons_are_those_of_the_results_pages(name, settings, study, rows):
    method = "feature" if study == "features" else "vanilla"
    expected = [
        perplexity(study, row.replace("*", f"{method}, ").replace("norm", "normalized_mse")) for row in rows.split("; ")
    ]
    pair = {"gap": (10, 110), "unlike": (Net(1), Other(1))}.get(study, (10, 25))
    reason = kdloss.suggest(*pair, **settings).reasons[name]
    numbers = re.findall(r"[\d.]*\d", reason.partition("measured on text: ")[2])
    assert expected in [numbers[i : i + len(expected)] for i in range(len(numbers))]


def test_the_gain_at_other_sizes_is_that_of_the_results_page():
    (warning,) = kdloss.suggest(10, 250).warnings
    rows = ["vanilla", *(f"vanilla, student-width {n}" for n in (64, 32, 16))]
    assert "by {}, {}, {} and {} %".format(*(cell("size", row, 3) for row in rows)) in warning


def test_the_perplexities_of_kept_blocks_are_those_of_the_results_page():
    teacher = gpt2(depth=4)
    reasons = kdloss.suggest(kdloss.keep_blocks(teacher, [0, 2]), teacher, goal="quality").reasons
    distilled, plain = perplexity("smollm2-15-little", "both"), perplexity("smollm2-15-little", "none")
    assert all(
        f"15 of 30 blocks {distilled}, against {plain} alone" in reasons[name] for name in ("layers", "distance")
    )


# Criteria.


def one_step(student, teacher, criterion, *args, prepare=False, **inputs):
    """Train for one step; assert that the criterion's parameters have gradients and that the student has changed."""
    model = kdloss.Distillation(student, teacher, criterion)
    if prepare:
        model.prepare(*args, **inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(*args, **inputs).loss
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is not None for p in criterion.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=False))
    return model


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.parametrize("goal", ["safe", "quality", "speed"])
@pytest.mark.parametrize("pair", ["other widths", "unlike", "kept"])
def test_the_criterion_trains_language_models(goal, pair):
    teacher = gpt2(width=24, depth=6)
    student = {
        "other widths": lambda: gpt2(width=16, depth=2),
        "unlike": lambda: build("llama", width=16, depth=2),
        "kept": lambda: kdloss.keep_blocks(teacher, "key"),
    }[pair]()
    criterion = kdloss.suggest(student, teacher, goal=goal).criterion()
    model = one_step(student, teacher, criterion, **batch("gpt2"))
    projected = pair == "other widths" and goal != "safe"
    projections = getattr(model.criterion, "projections", {}).values()
    assert [tuple(p.weight.shape) for p in projections] == [(24, 16)] * projected


@pytest.mark.parametrize("goal", ["safe", "quality", "speed"])
def test_the_criterion_trains_convolutional_nets(goal):
    student, teacher = ResNet((1, 1, 1)), ResNet((2, 1, 3), width=8)
    criterion = kdloss.suggest(student, teacher, goal=goal).criterion()
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    model = one_step(student, teacher, criterion, x, labels=labels, prepare=True)
    if goal != "safe":  # the last block at each of the sizes 8, 4 and 2
        named = [name for name in model(x, labels=labels).components if name.startswith("feature/")]
        assert named == ["feature/0-1", "feature/1-2", "feature/2-5"]


def test_the_criterion_trains_plain_modules_without_blocks():
    criterion = kdloss.suggest(nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3))).criterion()
    assert isinstance(criterion, kdloss.VanillaKD)
    student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3))
    one_step(student, teacher, criterion, torch.randn(2, 4), labels=torch.tensor([0, 2]))


def test_the_criterion_is_the_recipe_with_the_suggested_settings():
    teacher, student = gpt2(width=24, depth=6), gpt2(width=16, depth=2)
    advice, inputs = kdloss.suggest(student, teacher, goal="quality"), batch("gpt2")
    written = kdloss.FeatureKD(
        "last", pairing="uniform", distance=distances.layer_norm_mse, alpha=0.3, temperature=1.0, logit_weight=1.0
    )
    models = [kdloss.Distillation(student, teacher, criterion) for criterion in (advice.criterion(), written)]
    models[1].criterion.load_state_dict(models[0].criterion.state_dict())
    first, second = (model(**inputs).components for model in models)
    assert {"ce", "kd", "feature"} < first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    vanilla = kdloss.suggest(student, teacher).criterion()
    assert (type(vanilla), vanilla.temperature, vanilla.alpha) == (kdloss.VanillaKD, 1.0, 0.1)
    quick = kdloss.suggest(student, teacher, goal="speed").criterion()
    assert (type(quick), quick.logit_weight, quick.alpha) == (kdloss.FeatureKD, 0.0, 0.3)


def test_the_criterion_takes_the_recipes_other_settings():
    advice = kdloss.suggest(10, 20, goal="quality")
    criterion = advice.criterion(alpha=0.5, reduction="sum", logit_weight=2.0)
    assert (criterion.alpha, criterion.logit_weight, criterion.temperature) == (0.5, 2.0, 1.0)
    assert kdloss.suggest(10, 20).criterion(alpha=0.7).alpha == 0.7
    assert advice.criterion() is not advice.criterion()  # each has its own projections to train
    with pytest.raises(TypeError, match="nothing"):
        advice.criterion(nothing=1)


# Printing.


def test_advice_prints_as_a_table_of_aligned_columns():
    lines = str(kdloss.suggest(gpt2(width=16), gpt2(width=24, depth=40), goal="quality")).splitlines()
    table = lines[: lines.index("")]
    second, third = table[0].index("suggested"), table[0].index("because")
    assert table[0][second:].split() == ["suggested", "because"]
    for line in table:
        assert line[second - 1] == line[third - 1] == " " != line[third]
    named = {line[:second].strip(): line[second:third].strip() for line in table[1:] if line[0] != " "}
    assert named.pop("smaller").endswith("x")
    assert named == {
        "method": "both", "temperature": "1.0", "alpha": "0.3", "layers": "last", "pairing": "uniform",
        "distance": "layer_norm_mse",
    }  # fmt: skip
    assert max(map(len, lines)) <= WIDTH
    assert [line[:9] for line in lines].count("warning: ") == 1


def test_every_word_of_reasons_and_warnings_is_printed():
    advice = kdloss.suggest(of_vocabulary(5), of_vocabulary(30_000), goal="quality")
    assert len(advice.warnings) == 2
    shown = str(advice).split()
    words = [word for text in (*advice.reasons.values(), *advice.warnings) for word in text.split()]
    assert sorted(set(words) - set(shown)) == []


def test_the_session_in_the_docs_shows_the_advice_for_its_models():
    def model(layers, width, heads):
        shape = {"n_layer": layers, "n_embd": width, "n_head": heads}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**shape, vocab_size=2048, n_positions=64))

    page = (RESULTS.parent / "cli.md").read_text()
    assert f"\n\n{kdloss.suggest(model(2, 96, 3), model(4, 128, 4))}\n\n? method" in page


def test_advice_is_frozen():
    advice = kdloss.suggest(10, 20)
    assert isinstance(advice, Advice)
    with pytest.raises(AttributeError):
        advice.alpha = 0.5


# Errors.


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "reason"),
    [
        (("gpt2", 20), {}, TypeError, "student is a model or its number of parameters, got str"),
        ((10, True), {}, TypeError, "teacher is a model or its number of parameters, got bool"),
        ((10, None), {}, TypeError, "teacher is a model or its number of parameters, got NoneType"),
        ((10, kdloss.Teacher(Net(3))), {}, TypeError, "of a kdloss.Teacher give its .module"),
        ((0, 20), {}, ValueError, "the student's number of parameters must be above 0, got 0"),
        ((10, -2.0), {}, ValueError, "the teacher's number of parameters must be above 0, got -2.0"),
        ((10, float("inf")), {}, ValueError, "the teacher's number of parameters must be finite, got inf"),
        ((nn.ReLU(), 20), {}, ValueError, "the student, ReLU, has no parameters; give their number"),
        ((10, 20), {"teacher_quality": "strng"}, ValueError, "did you mean 'strong'"),
        ((10, 20), {"task": "medium"}, ValueError, "task='medium' is unknown; choose one of ['easy', 'hard']"),
        ((10, 20), {"goal": "fast"}, ValueError, "goal='fast' is unknown; choose one of ['safe', 'quality', 'speed']"),
    ],
)
def test_invalid_arguments_are_refused(arguments, settings, error, reason):
    with pytest.raises(error, match=re.escape(reason)):
        kdloss.suggest(*arguments, **settings)


def hf_resnet(width):
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [1, 2]}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, layer_type="basic", num_labels=5))
