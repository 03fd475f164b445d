"""Every distance in use: in `FeatureKD`, on models, with peft and with an optimizer."""

import inspect
from functools import partial

import pytest
import torch
from families import batch, build
from versions import since_transformers_5

import kdloss
from kdloss import distances

OPTIONS = {
    "attention_mse": {"heads": 2},
    "minilm": {"heads": 2},
    "minilm_v2": {"relation_heads": 2},
    "CRD": {"negatives": 64},
    "MGD": {"size": (1, -1)},
}
HELPERS = {"tokens", "between_tokens", "between_examples", "examples"}
QKV = {
    "attention_mse": ("query", "key"),
    "minilm": ("query", "key", "value"),
    "minilm_v2": ("query", "key", "value"),
}
NAMES = sorted({*distances.__all__} - HELPERS)


def qkv(name, block):
    return tuple(f"bert.encoder.layer.{block}.attention.self.{part}" for part in QKV[name])


def criterion_for(name, **settings):
    options = OPTIONS.get(name, {})
    distance = getattr(distances, name)
    settings = {"distance": partial(distance, **options) if options else distance, "alpha": 0.0, **settings}
    if name in QKV:  # BERT's projections, concatenated
        pairs = [(0, 1), (2, 4)]
        return kdloss.FeatureKD(pairing=[(qkv(name, s), qkv(name, t)) for s, t in pairs], **settings)
    return kdloss.FeatureKD("auto", **settings)


def models():
    return build("bert", width=24, depth=5), build("bert", depth=3, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_distance_trains_a_narrower_student_and_ignores_padding(name):
    teacher, student = models()
    data = batch("bert")
    data["attention_mask"][0, -2:] = 0
    distill = kdloss.Distiller(teacher, criterion_for(name)).prepare(student, **data)
    parameters = [*student.parameters(), *distill.criterion.parameters()]
    assert any(p.requires_grad for p in distill.criterion.parameters()) == (
        name in ("CRD", "VID", "MGD") or not getattr(getattr(distances, name), "any_width", False)
    )
    torch.manual_seed(0)
    out = distill(student.eval(), **data)
    out.loss.backward()
    trained = [p.grad for p in parameters if p.grad is not None]
    assert all(g.isfinite().all() for g in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in distill.criterion.parameters())
    assert max(g.abs().max() for g in trained) > 0
    if name == "CRD":
        return  # the first step has changed its memory
    # Other padding tokens change nothing, because neither attention nor the loss reads them.
    data["input_ids"][0, -2:] = (data["input_ids"][0, -2:] + 1) % 7
    torch.manual_seed(0)
    torch.testing.assert_close(distill(student, **data).loss, out.loss)


# Without CRD: its memory fills with this same batch, so its negatives become harder; see test_module_distances.
@pytest.mark.parametrize("name", sorted({*NAMES} - {"CRD"}))
def test_an_optimizer_lowers_every_distance(name):
    teacher, student = models()
    data = batch("bert")
    distill = kdloss.Distiller(teacher, criterion_for(name)).prepare(student, **data)
    optimizer = torch.optim.Adam([*student.parameters(), *distill.criterion.parameters()], 1e-2)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = distill(student.eval(), **data).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # After a layer norm, features have the same norm at every position, so attention transfer starts at 0.
    assert losses[-1] < (1e-6 if name == "attention_transfer" else losses[0])


def test_a_tuple_of_module_names_stands_for_their_concatenated_outputs():
    teacher, student = models()
    distill = kdloss.Distiller(teacher, criterion_for("minilm"))
    out = distill(student.eval(), **batch("bert"))
    module_name = "bert.encoder.layer.{}.attention.self.{}"
    values = []
    for s, t in ((0, 1), (2, 4)):
        outputs = []
        for model, i in ((student, s), (teacher.eval(), t)):
            names = [module_name.format(i, x) for x in QKV["minilm"]]
            inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
            with kdloss.capture(model, names) as seen:
                model(**inputs)
            outputs.append(torch.cat([seen[n] for n in names], -1))
        keep = batch("bert")["labels"] != -100
        keep &= batch("bert")["attention_mask"].bool()
        value = kdloss.masked(partial(kdloss.distances.minilm, heads=2), *outputs, keep)
        values.append(value)
    torch.testing.assert_close(out.loss, torch.stack(values).mean())
    assert "+" in next(name for name in out.components if name.startswith("feature/"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # raised inside peft
@pytest.mark.parametrize(
    "settings",
    [{}, {"projection": kdloss.projections.mlp}, {"shared": True}, {"distance": kdloss.distances.VID}],
)
def test_projections_train_together_with_a_peft_student(settings):
    peft = pytest.importorskip("peft")
    teacher, student = build("gpt2", width=24, depth=4), build("gpt2", seed=1)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    student = peft.get_peft_model(student, lora)
    criterion = kdloss.FeatureKD("auto", **settings)
    distill = kdloss.Distiller(teacher, criterion).prepare(student)
    trained = [p for p in [*student.parameters(), *criterion.parameters()] if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(2):  # LoRA's second factor starts at 0, so its first moves at the second step
        optimizer.zero_grad()
        distill(student, **batch("gpt2")).loss.backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    restored = kdloss.FeatureKD("auto", **settings)
    kdloss.Distiller(teacher, restored).prepare(student)
    restored.load_state_dict(criterion.state_dict())
    with torch.no_grad():
        losses = [kdloss.Distiller(teacher, c)(student.eval(), **batch("gpt2")).loss for c in (criterion, restored)]
    assert torch.equal(*losses)


def test_every_distance_documents_its_errors_an_example_and_its_source():
    for name in NAMES:
        text = inspect.getdoc(getattr(distances, name))
        assert "Raises:" in text, name
        assert ">>>" in text, name
        assert "arXiv" in text or "20" in text or name in ("normalized_mse", "standardized_mse"), name


def test_maps_of_several_modules_are_concatenated_along_their_channels():
    def tower():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1))

    teacher, student = tower(), tower()
    images = torch.randn(2, 3, 6, 6)
    criterion = kdloss.FeatureKD(pairing=[(("0", "1"), ("0", "1"))], distance=kdloss.distances.fsp, alpha=0.0)
    loss = kdloss.Distiller(teacher, criterion)(student, images).loss
    flows = []
    for model in (student, teacher):
        early = model[0](images)
        flows.append(torch.einsum("bchw,bdhw->bcd", early, model[1](early)) / 16)
    torch.testing.assert_close(loss, (flows[0] - flows[1]).square().sum((1, 2)).mean())


@since_transformers_5  # earlier versions return attention maps only on request
def test_take_selects_one_entry_of_a_modules_output():
    """As in TinyBERT, compare the attention maps that an eager model returns, with heads as channels."""
    teacher, student = (build("bert", depth=3, seed=seed) for seed in (0, 1))
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    names = [f"bert.encoder.layer.{i}.attention.self" for i in (0, 2)]
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    criterion = kdloss.FeatureKD(pairing=[(names[0], names[1])], take={names[0]: 1, names[1]: 1}, alpha=0.0)
    value = kdloss.Distiller(teacher, criterion)(student.eval(), **inputs).loss
    maps = []
    for model, name in ((student, names[0]), (teacher.eval(), names[1])):
        with kdloss.capture(model, [name], take=1) as seen:
            model(**inputs)
        maps.append(seen[name])
    assert maps[0].ndim == 4
    torch.testing.assert_close(value, (maps[0] - maps[1]).square().mean())
