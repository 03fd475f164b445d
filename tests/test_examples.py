"""The main example in small, and what its parts promise."""

import copy
import json
import math

import distill_lm
import pytest
import torch
from parts import evaluation, memory, models, options, text
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import kdloss

SENTENCES = [
    f"Number {i} is {'even' if i % 2 == 0 else 'odd'}, and the number {i + 1} follows right after it."
    for i in range(400)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    file.write_text("\n".join(json.dumps({"id": str(i), "note": s}) for i, s in enumerate(SENTENCES)))
    return file


@pytest.fixture(scope="module")
def demo(data, tmp_path_factory):
    """All methods in small: arguments, results, output folder."""
    torch.set_num_threads(1)  # as in every test; this runs before the first
    output = tmp_path_factory.mktemp("runs")
    small = {
        "--data": data, "--heldout-samples": 40, "--max-length": 16, "--vocabulary": 300,
        "--teacher-width": 32, "--teacher-layers": 3, "--teacher-heads": 2, "--teacher-lr": 5e-3,
        "--teacher-epochs": 2, "--student-width": 16, "--student-heads": 2, "--student-samples": 60,
        "--steps": 20, "--lr": 5e-3, "--points": 2, "--continuations": 4,
        "--teachers": output / "teachers", "--output": output,
    }  # fmt: skip
    arguments = [str(part) for pair in small.items() for part in pair]
    return arguments, distill_lm.main(arguments), output


def new_model(layers=2, width=16):
    shape = {"n_head": 2, "vocab_size": 11, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, **shape, **plain))


def test_all_methods_start_from_one_student_and_learn(demo):
    _, runs, _ = demo
    assert list(runs) == ["teacher", *distill_lm.METHODS]
    found = [runs[method][0] for method in distill_lm.METHODS]
    (start,) = {result["curve"][0]["perplexity"] for result in found}
    assert all(result["perplexity"] < 0.8 * start for result in found)
    assert len({result["perplexity"] for result in found}) == len(found)  # no two methods are one


def test_training_alone_gets_the_seconds_of_the_slowest_distilled(demo):
    _, runs, _ = demo
    slowest = max(runs[method][0]["seconds"] for method in distill_lm.DISTILLED)
    alone = runs["alone"][0]
    assert runs["alone-same-time"][0]["steps"] == round(alone["steps"] * slowest / alone["seconds"])


def test_written_students_load_and_are_those_that_were_measured(demo, data):
    _, runs, output = demo
    folder = output / "students" / "vanilla-seed0"
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = text.read_texts(str(data))
    blocks = text.pack(text.tokenize(tokenizer, texts[:40]), 16)
    assert evaluation.perplexity(student, blocks) == pytest.approx(
        runs["vanilla"][0]["perplexity"], rel=1e-4
    )


def test_results_are_written_and_the_teacher_is_kept(demo, capsys):
    arguments, runs, output = demo
    saved = json.loads((output / "results.json").read_text())
    assert saved["summary"]["vanilla"]["perplexity"]["mean"] == runs["vanilla"][0]["perplexity"]
    assert saved["settings"]["seeds"] == [0]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| vanilla" in (output / "results.md").read_text()
    again = distill_lm.main([*arguments, "--methods", "alone", "--output", str(output / "again")])
    assert "trained earlier" in capsys.readouterr().out
    assert again["teacher"][0]["perplexity"] == runs["teacher"][0]["perplexity"]
    assert again["alone"][0]["perplexity"] == runs["alone"][0]["perplexity"]


def test_a_student_of_kept_blocks_of_a_given_teacher(demo, tmp_path):
    arguments, _, output = demo
    (teacher,) = (output / "teachers").iterdir()
    flags = f"--teacher {teacher} --keep-blocks 0,2 --pairing kept --layers all --methods feature --steps 3"
    runs = distill_lm.main([*arguments, *flags.split(), "--output", str(tmp_path)])
    assert runs["feature"][0]["steps"] == 3
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "students" / "feature-seed0")
    assert student.config.kept_blocks == {"transformer.h": [0, 2]}


@pytest.mark.parametrize("criterion", [kdloss.VanillaKD(), kdloss.FeatureKD("last", logit_weight=1.0)])
def test_the_loop_runs_on_padded_documents_and_ignores_the_padding(criterion):
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]])
    real = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    labels = tokens.masked_fill(real == 0, -100)
    learned = []
    for ids in (tokens, torch.where(real == 0, 10, tokens)):
        torch.manual_seed(0)
        teacher, student, ours = new_model(3, 24), new_model(), copy.deepcopy(criterion)
        distill = kdloss.Distiller(teacher, ours).prepare(student)
        optimizer = torch.optim.AdamW([*student.parameters(), *ours.parameters()], lr=1e-2)
        batch = {"input_ids": ids, "attention_mask": real, "labels": labels}
        curve = distill_lm.train(distill, student, optimizer, [batch] * 3, 3, lambda model: 1.0, points=1)
        assert [point["tokens"] for point in curve] == [0, 36]
        learned.append(student.transformer.h[0].mlp.c_fc.weight.detach())
    torch.testing.assert_close(*learned)


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens():
    torch.manual_seed(0)
    model, blocks = new_model(), torch.randint(0, 11, (5, 8))
    logits = model.eval()(input_ids=blocks).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), blocks[:, 1:].reshape(-1))
    assert evaluation.perplexity(model, blocks, batch_size=2) == pytest.approx(
        math.exp(expected.item()), rel=1e-5
    )


def test_memory_counts_what_is_alive_at_the_peak():
    weight = torch.zeros(1000)

    def step():
        first = weight + 1  # 1000 floats
        second = first * 2  # 2000
        del first
        return second.view(-1) + 1  # 2000; a view is no new memory

    assert memory.training_memory(step, [weight]) == 3 * 1000 * 4


def test_batches_show_every_block_once_before_any_comes_again():
    blocks = torch.arange(5)[:, None]
    seen = [batch["input_ids"].flatten().tolist() for batch in text.batches(blocks, 2, 6, seed=0)]
    first, second = ([i for batch in part for i in batch] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert seen == [b["input_ids"].flatten().tolist() for b in text.batches(blocks, 2, 6, seed=0)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"id": "x", "summary": "S one", "article": "A one"}\n{"id": "y", "article": "A two"}'),
        ("a.json", '[{"id": "x", "article": "A one"}, {"id": "y", "article": "A two"}]'),
        ("a.csv", "id,article\nx,A one\ny,A two\nz,\n"),
        ("a.txt", "A one\n\nA two\n\n\nA one\n"),
    ],
)
def test_files_are_read_and_their_text_column_found(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert sorted(text.read_texts(str(tmp_path / name))) == ["A one", "A two"]


def test_without_a_known_column_the_longest_text_is_taken(data):
    assert sorted(text.read_texts(str(data))) == sorted(SENTENCES)
    assert len(text.read_texts(str(data), column="id", limit=7)) == 7


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("missing.jsonl", None, {}, "there is no file"),
        ("a.xml", "<a/>", {}, r"ends in '.xml'; known are \['.jsonl'"),
        ("a.jsonl", '{"size": 1, "weight": 2.5}', {}, "no column holds text; there are.*size.*weight"),
        ("a.jsonl", '{"text": "A"}', {"column": "body"}, r"no column 'body', only \['text'\]"),
        ("a.jsonl", '{"text": " "}\n{"text": ""}', {}, "all 2 entries are empty"),
        ("a.txt", "\n\n", {}, "is empty"),
    ],
)
def test_bad_text_is_refused(tmp_path, monkeypatch, name, content, options, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        text.read_texts(name, **options)


def test_a_dataset_is_read_by_name_with_its_config_and_split(tmp_path):
    """The real loader, on a dataset that lies in a folder, as there is no hub in a test."""
    folder = tmp_path / "stories"
    for config in ("short", "long"):
        for split in ("train", "test"):
            (folder / config).mkdir(parents=True, exist_ok=True)
            line = json.dumps({"id": "x", "text": f"{config} {split}"})
            (folder / config / f"{split}.jsonl").write_text(line)
    parts = "".join(
        f"- config_name: {c}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {c}/{s}.jsonl\n" for s in ("train", "test"))
        for c in ("short", "long")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    assert text.read_texts(str(folder), config="long", split="test") == ["long test"]
    assert text.read_texts(str(folder), config="short") == ["short train"]


def test_a_dataset_that_cannot_be_reached_is_said_so(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError(f"{name}, {config}, {split}")

    monkeypatch.setattr(text.datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="nor a dataset that can be reached"):
        text.read_texts("no/such-dataset", config="all", split="test")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--heldout-samples", "400"], "all 400 texts are held out"),
        (["--methods", "alone-same-time"], "needs 'alone'"),
        (["--max-length", "64"], "no held-out text has 64 tokens"),
        (["--teacher", "missing.gguf"], "there is no file"),
        (["--student-width", "15"], "does not divide into 2 heads"),
    ],
)
def test_bad_settings_are_refused(demo, tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        distill_lm.main([*demo[0], "--output", str(tmp_path), *flags])


def test_without_the_wikipedia_package_pythons_documentation_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "module.py").write_text(f'def f():\n    """{"Long. " * 40}"""\n')
    found = text.read_texts()
    assert ("Long. " * 40).strip() in found
    assert len(found) > 50


def test_a_saved_folder_is_replaced_as_a_whole(tmp_path):
    tokenizer = text.train_tokenizer(["a b c"], 260)
    for layers in (1, 2):
        models.save(new_model(layers), tokenizer, tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.n_layer == 2
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("last", "uniform")),
        (["--layers", "all", "--pairing", "same"], ("all", "same")),
        (["--layers=0,-1"], ([0, -1], "uniform")),
        (["--layers", "transformer.ln_f"], (["transformer.ln_f"], "uniform")),
        (["--pairing", "0:1,1:3"], ("auto", [(0, 1), (1, 3)])),
        (["--pairing", "transformer.ln_f:model.norm"], ("auto", [("transformer.ln_f", "model.norm")])),
    ],
)
def test_layers_and_pairs_from_flags(flags, expected):
    args = options.parser("", distill_lm.METHODS).parse_args(flags)
    chosen = distill_lm.criterion_for("feature", args).layer_map
    assert (chosen.layers, chosen.pairing) == expected
