"""distill_lm.py and encoder.py at a small size, and the modules that the applications share."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import distill_lm
import encoder
import pytest
import tiny
import torch
from parts import cells, evaluation, files, memory, models, options, report, setup, text
from parts.checkpoint import Checkpoint
from tiny import SENTENCES
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import kdloss


@pytest.fixture(scope="module")
def demo(data, tmp_path_factory):
    """Run distill_lm.py at a small size; return arguments, results and output folder."""
    torch.set_num_threads(1)  # as in every test; this fixture runs before theirs
    output = tmp_path_factory.mktemp("runs")
    arguments = tiny.flags(data, output)
    return arguments, distill_lm.main(arguments), output


def new_model(layers=2, width=16):
    shape = {"n_head": 2, "vocab_size": 11, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, **shape, **plain))


def settings(flags):
    return options.read(distill_lm.DEFAULTS, flags, None)


def must_not_run(*args, **settings):
    raise AssertionError("this was done before")


def test_a_student_learns_with_and_without_a_teacher(demo):
    _, runs, _ = demo
    assert list(runs) == ["teacher", "none", "vanilla"]
    alone, distilled = runs["none"][0], runs["vanilla"][0]
    assert alone["curve"][0]["perplexity"] == distilled["curve"][0]["perplexity"]
    assert all(run["perplexity"] < 0.8 * run["curve"][0]["perplexity"] for run in (alone, distilled))
    assert alone["perplexity"] != distilled["perplexity"]
    assert distilled["against_none"] == pytest.approx(
        100 * (distilled["perplexity"] - alone["perplexity"]) / alone["perplexity"]
    )
    assert distilled["retention"] == pytest.approx(100 * runs["teacher"][0]["perplexity"] / distilled["perplexity"])


def test_saved_students_load_and_have_the_measured_perplexity(demo, data):
    _, runs, _ = demo
    run = runs["vanilla"][0]
    student = AutoModelForCausalLM.from_pretrained(run["student"])
    tokenizer = AutoTokenizer.from_pretrained(run["student"])
    texts = text.read_texts(str(data))
    blocks = text.pack(text.tokenize(tokenizer, texts[-40:]), 16)
    assert evaluation.perplexity(student, blocks) == pytest.approx(run["perplexity"], rel=1e-4)


def test_results_are_written(demo):
    _, runs, output = demo
    saved = json.loads((output / "results.json").read_text())
    assert saved["summary"]["vanilla"]["perplexity"]["mean"] == runs["vanilla"][0]["perplexity"]
    assert saved["settings"]["seed"] == 0
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "| vanilla" in (output / "results.md").read_text()
    assert not list(output.rglob("*.partial")) + list(output.rglob("*.checkpoints"))


def test_the_same_command_trains_nothing_again(demo, monkeypatch, capsys):
    arguments, runs, _ = demo
    monkeypatch.setattr(distill_lm, "train", must_not_run)
    assert distill_lm.main(arguments) == runs
    assert "trained earlier" in capsys.readouterr().out


def test_changed_settings_retrain_only_the_students_they_affect(demo, monkeypatch):
    arguments, runs, _ = demo
    trained = []
    fit = distill_lm.fit
    monkeypatch.setattr(distill_lm, "fit", lambda *a: trained.append(a[-1]) or fit(*a))
    again = distill_lm.main([*arguments, "--temperature", "3"])
    assert trained == ["vanilla (0)"]  # training without a teacher has no temperature
    assert again["none"] == runs["none"]
    assert again["vanilla"][0]["perplexity"] != runs["vanilla"][0]["perplexity"]


def test_a_student_is_made_of_the_kept_blocks_of_a_saved_teacher(demo, tmp_path):
    arguments, _, output = demo
    (teacher,) = (output / "teachers").iterdir()
    more = f"--teacher {teacher} --keep-blocks 0,2 --pairing kept --layers all --method feature --steps 3"
    runs = distill_lm.main([*arguments, *more.split(), "--output", str(tmp_path)])
    assert runs["feature"][0]["steps"] == 3
    student = AutoModelForCausalLM.from_pretrained(runs["feature"][0]["student"])
    assert student.config.kept_blocks == {"transformer.h": [0, 2]}


def test_a_student_deeper_than_its_teacher_is_distilled(demo, tmp_path):
    more = "--student-layers 5 --layers all --method both --steps 2"
    runs = distill_lm.main([*demo[0], *more.split(), "--output", str(tmp_path)])
    assert runs["both"][0]["perplexity"] < runs["both"][0]["curve"][0]["perplexity"]


@pytest.mark.parametrize(("threads", "seconds"), [(1, 1.0), (2, 2.0)])
def test_seconds_are_cpu_time_with_one_thread_and_wall_time_with_several(monkeypatch, threads, seconds):
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(process_time=lambda: 1.0, perf_counter=lambda: 2.0))
    torch.set_num_threads(threads)
    assert evaluation.clock(torch.device("cpu")) == seconds


def test_a_new_student_has_the_vocabulary_size_of_its_teacher_even_if_it_is_padded():
    tokenizer, teacher = text.train_tokenizer(SENTENCES, 300), new_model()
    teacher.resize_token_embeddings(320)
    assert setup.student_of(distill_lm.DEFAULTS, teacher, tokenizer).config.vocab_size == 320


def test_the_same_seed_draws_the_same_blocks_of_text_and_another_seed_draws_others():
    blocks = torch.arange(10)[:, None]
    first, again, other = (set(text.draw(blocks, 4, seed).flatten().tolist()) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 4
    assert torch.equal(text.draw(blocks, None, 0), blocks)
    with pytest.raises(ValueError, match="11 blocks of text are asked for, and there are 10: lower --student-blocks"):
        text.draw(blocks, 11, 0)


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
    assert evaluation.perplexity(model, blocks, batch_size=2) == pytest.approx(math.exp(expected.item()), rel=1e-5)


def test_memory_is_that_of_the_tensors_alive_at_the_peak():
    weight = torch.zeros(1000)

    def step():
        first = weight + 1  # 1000 floats
        second = first * 2  # 2000
        del first
        return second.view(-1) + 1  # 2000; a view takes no memory

    assert memory.training_memory(step, [weight]) == 3 * 1000 * 4


def test_batches_contain_every_block_once_before_any_is_repeated():
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
def test_files_are_read_and_their_text_column_is_recognised(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert sorted(text.read_texts(str(tmp_path / name))) == ["A one", "A two"]


def test_without_a_known_column_name_the_longest_texts_are_read(data):
    assert sorted(text.read_texts(str(data))) == sorted(SENTENCES)
    assert len(text.read_texts(str(data), column="id", limit=7)) == 7


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("missing.jsonl", None, {}, "there is no file"),
        ("a.md", "# A", {}, r"'a.md' ends in '.md', and only .jsonl, .* files can be read: copy plain text to a.txt"),
        ("a.jsonl", '{"size": 1, "weight": 2.5}', {}, "no column holds text; there are.*size.*weight"),
        ("a.jsonl", '{"text": "A"}', {"column": "body"}, r"no column 'body', only \['text'\]"),
        ("a.jsonl", '{"text": " "}\n{"text": ""}', {}, "all 2 entries are empty"),
        ("a.csv", "id,text\n1,\n2,\n", {}, r"\['text'\] are empty in every line"),
        ("a.txt", "\n\n", {}, "is empty"),
        ("a.jsonl", '{"text": "A"}\n{"text": "B"\n{"text": "C"}', {}, "line 2 of 'a.jsonl' can't be read"),
        ("a.json", '[{"text": "A"},\n{"text": }]', {}, "line 2 of 'a.json' can't be read"),
        ("a.csv", "id,text\n1,A\n2,B,C,D\n", {}, "'a.csv': .*line 3, saw 4"),
        ("a.txt", b"A\n\n\xff\xfe", {}, "line 3 of 'a.txt' can't be read: 'utf-8'"),
        ("a.jsonl", b'{"text": "A"}\n\xff', {}, "line 2 of 'a.jsonl' can't be read: 'utf-8'"),
        ("a.jsonl", '{"text": "A"}\n{"text": 5}', {}, "entry 2 of 'a.jsonl' is not text but 5"),
    ],
)
def test_bad_text_is_refused(tmp_path, monkeypatch, name, content, options, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        text.read_texts(name, **options)


@pytest.mark.parametrize(
    ("file", "message"), [("a.csv", "one of its files, for example texts/a.csv"), ("a.md", "a .jsonl, .json, ")]
)
def test_a_folder_that_is_not_a_dataset_is_refused_and_the_message_says_what_to_pass(
    tmp_path, monkeypatch, file, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / file).write_text("text\n---\n")
    (tmp_path / "texts" / "README.md").write_text("no card")
    with pytest.raises(ValueError, match=f"'texts' is a folder but not a dataset: pass {message}"):
        text.read_texts("texts")


def test_a_dataset_is_read_by_name_with_its_config_and_split(tmp_path):
    """Use the real loader on a dataset in a folder, because tests are offline."""
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


def test_a_dataset_that_cannot_be_reached_raises_an_error(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError(f"{name}, {config}, {split}")

    monkeypatch.setattr(text.datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="nor a dataset that can be reached"):
        text.read_texts("no/such-dataset", config="all", split="test")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heldout-samples", "400"], "all 400 texts are held out"),
        (["--max-length", "64"], "no held-out text has 64 tokens"),
        (["--teacher", "missing.gguf"], "there is no file"),
        (["--teacher", "no/such-model"], "'no/such-model' is neither a folder with a model"),
        (["--student-width", "15"], "does not divide into 2 heads"),
        (["--student", "other-tokens"], "the sizes are equal, but ids stand for different tokens"),
        (["--student", "other-size"], "a vocabulary of 290 tokens, the teacher one of 300"),
        (["--student", "short"], "the student reads at most 8 tokens, not 16: pass --max-length 8"),
        (["--teacher", "short"], "the teacher reads at most 8 tokens, not 16: pass --max-length 8"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(
    demo, incompatible_models, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(incompatible_models)
    monkeypatch.setattr(distill_lm, "fit", must_not_run)
    with pytest.raises(ValueError, match=message):
        distill_lm.main([*demo[0], "--output", str(tmp_path / "out"), *flags])
    assert not list(tmp_path.rglob("students"))


@pytest.fixture(scope="module")
def incompatible_models(demo, tmp_path_factory):
    _, runs, _ = demo
    folder = tmp_path_factory.mktemp("models")
    right = AutoTokenizer.from_pretrained(runs["none"][0]["student"])
    wrong = {
        "other-tokens": (text.train_tokenizer(["zyx wvu tsr qpo nml " * 9, *SENTENCES], 300), 16),
        "other-size": (text.train_tokenizer(SENTENCES, 290), 16),
        "short": (right, 8),
    }
    for name, (tokenizer, length) in wrong.items():
        model = models.gpt2(1, 16, 2, dropout=0.0, tokenizer=tokenizer, length=length)
        models.save(model, tokenizer, folder / name)
    return folder


def test_without_the_wikipedia_package_pythons_documentation_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "module.py").write_text(f'def f():\n    """{"Long. " * 40}"""\n')
    texts = text.read_texts()
    assert ("Long. " * 40).strip() in texts
    assert len(texts) > 50


def test_saving_into_an_existing_folder_replaces_it_completely(tmp_path):
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
def test_flags_set_layers_and_pairing(flags, expected):
    args = settings([*flags, "--method", "feature"])
    chosen = distill_lm.criterion_for(args).terms["feature"].layer_map
    assert (chosen.layers, chosen.pairing) == expected


@pytest.mark.parametrize("name", options.DISTANCES)
def test_every_distance_trains_a_student_or_is_refused_because_it_needs_other_tensors(name):
    args = settings(["--method", "feature", "--distance", name])
    if name in options.SIDE_BY_SIDE:
        with pytest.raises(ValueError, match=f"{name} compares .* side by side, and --layers gives single hidden"):
            distill_lm.criterion_for(args)
        return
    teacher, student = new_model(3, 24), new_model()
    distill = kdloss.Distiller(teacher, distill_lm.criterion_for(args)).prepare(student)
    tokens = torch.randint(0, 11, (4, 8))
    out = distill(student, input_ids=tokens, labels=tokens)
    out.loss.backward()
    assert out.components["feature"] > 0
    assert student.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", options.DIVERGENCES)
def test_every_divergence_can_be_chosen(name):
    for method in ("vanilla", "both"):
        args = settings(["--method", method, "--divergence", name])
        assert distill_lm.criterion_for(args).terms["kd"].divergence is getattr(kdloss.divergences, name)


def test_a_cell_is_computed_once_unless_its_settings_change_or_its_product_is_missing(tmp_path):
    done = []

    def work(folder):
        done.append(folder)
        return {"value": len(done)}

    product = tmp_path / "model"
    product.mkdir()
    values = [cells.cell(tmp_path, "a", {"x": x}, work, product)["value"] for x in (1, 1, 2, 1)]
    assert values == [1, 1, 2, 1]
    product.rmdir()
    assert cells.cell(tmp_path, "a", {"x": 1}, work, product) == {"value": 3}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "results.json"
    files.save_json({"a": 1}, file)

    def write_half(partial):
        partial.write_text("half")
        raise OSError("No space left on device")

    with (
        pytest.raises(OSError, match=r"results.json could not be written \(No space left"),
        files.replacing(file) as partial,
    ):
        write_half(partial)
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_checkpoint_is_skipped_and_the_previous_one_is_loaded(tmp_path):
    model, notes = new_model(), {"step": 0}
    checkpoint = Checkpoint(tmp_path, every=0.0, model=model)
    weights = []
    for step in (1, 2, 3):
        torch.manual_seed(step)
        torch.nn.init.normal_(model.lm_head.weight)
        weights.append(model.lm_head.weight.detach().clone())
        checkpoint.save(step, notes | {"step": step})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000002.pt", "step-00000003.pt"]
    newest = tmp_path / "step-00000003.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"step-00000003.pt can't be read and is passed over"):
        assert checkpoint.load() == {"step": 2}
    drawn = torch.rand(3)
    assert torch.equal(model.lm_head.weight, weights[1])
    torch.manual_seed(2)
    torch.nn.init.normal_(torch.empty_like(weights[1]))
    assert torch.equal(drawn, torch.rand(3))  # the random state after step 2 is restored


def test_rouge_equals_values_computed_by_hand():
    """F1 scores of the shared words, of the shared pairs of words and of the longest common subsequence."""
    first = evaluation.rouge(["the cat sat"], ["the cat ran off"])  # shared: 2 of 3 and 4; 1 of 2 and 3; 2
    assert first == pytest.approx({"rouge_1": 400 / 7, "rouge_2": 200 / 5, "rouge_l": 400 / 7})
    second = evaluation.rouge(["cat the sat"], ["the cat ran off"])  # shared: 2 of 3 and 4; none; 1
    assert second == pytest.approx({"rouge_1": 400 / 7, "rouge_2": 0, "rouge_l": 200 / 7})


def test_a_judge_scores_sampled_text_token_by_token():
    writer, judge = (model.train() for model in (new_model(), new_model(3, 24)))
    writer.transformer.drop.p = judge.transformer.drop.p = 0.5  # evaluation switches dropout off
    prompts, reference = torch.randint(0, 11, (5, 4)), torch.randint(0, 11, (5, 6))
    tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: [" ".join(f"w{i}" for i in row) for row in ids.tolist()])
    scores, repeated = (evaluation.evaluate(writer, tokenizer, prompts, reference, judge) for _ in range(2))
    assert scores["samples"] == repeated["samples"]
    written = evaluation.sample(writer, prompts, 10, torch.Generator().manual_seed(0))
    for column, model in {"samples": judge, "own": writer}.items():
        logs = model.eval()(input_ids=written).logits.double().log_softmax(-1)[:, 3:9]  # of tokens 4 to 9
        mean_log_prob = logs.gather(-1, written[:, 4:, None]).mean()
        assert scores[column] == pytest.approx(math.exp(-mean_log_prob.item()), rel=1e-5)
    greedy = evaluation.generate(writer, prompts, 6)[0].tolist()
    pairs = [pair for row in greedy for pair in itertools.pairwise(row)]
    assert scores["distinct_2"] == 100 * len(set(pairs)) / 25
    assert "samples" not in evaluation.evaluate(writer, tokenizer, prompts, reference)


def test_a_table_shows_means_deviations_and_only_columns_with_values():
    runs = {"teacher": [{"perplexity": 9.0}], "none": [{"perplexity": 10.0}, {"perplexity": 14.0}]}
    header, line, teacher, none = report.table(runs).splitlines()
    assert set(line) == {"|", "-"}  # Markdown
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["", "held-out perplexity"]
    assert "9.0 " in teacher
    assert "12.0 ± 2.8" in none  # sqrt(((10-12)² + (14-12)²) / (2-1))


# --- encoder.py: students of some of an encoder's blocks


@pytest.fixture
def encoder_flags(tmp_path):
    """Return flags of a run that takes seconds, with a new BERT of four blocks and texts of two topics."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *(f"w{i}" for i in range(20))]
    (tmp_path / "words.txt").write_text("\n".join(words))
    sizes = {"vocab_size": len(words), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "words.txt")).save_pretrained(tmp_path / "bert")
    entries = [{"extract": f"W{i % 20} w{i // 20}. W{i // 20} it is.", "topic": "ab"[i % 2]} for i in range(60)]
    entries += [{"extract": "W1. W2.", "topic": "Uncategorized"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, entries)))
    more = "--heldout-samples 16 --batch-size 6 --steps 4 --teacher-steps 2 --relation-heads 2 --lrs 1e-3"
    files = [f"--encoder={tmp_path / 'bert'}", f"--data={tmp_path / 'texts.jsonl'}", f"--output={tmp_path / 'runs'}"]
    return [*files, *more.split(), "--keep", "0,3", "--seeds", "0"]


def test_distilled_encoders_are_compared_with_one_without_a_teacher_at_equal_steps_and_at_equal_operations(
    encoder_flags, tmp_path, monkeypatch
):
    runs = encoder.main(encoder_flags)
    rows = {
        "topics": ["labels", "labels, equal operations", "logits", "hidden", "relations", "logits and hidden"],
        "sentences": ["pairs", "pairs, equal operations", "embedding", "hidden", "relations", "embedding and hidden"],
    }
    for task, measure in (("topics", "accuracy"), ("sentences", "mrr")):
        trained = [f"blocks 0, 3: {row}" for row in rows[task]]
        assert list(runs[task]) == ["teacher, 4 blocks", "blocks 0, 3 as cut", *trained]
        alone, longer, *distilled = (runs[task][row][0] for row in trained)
        assert longer["steps"] > alone["steps"] == 4
        costliest, one_step = max(x["teraflop"] for x in distilled), alone["teraflop"] / 4
        assert longer["teraflop"] == pytest.approx(costliest, abs=one_step)
        assert longer["share"] == pytest.approx(100 * longer[measure] / runs[task]["teacher, 4 blocks"][0][measure])
        assert longer["lr"] == alone["lr"]
    assert "| blocks 0, 3: relations " in (tmp_path / "runs" / "results.md").read_text()
    assert (tmp_path / "runs" / "results.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(encoder.encoders, "train", must_not_run)
    assert encoder.main(encoder_flags) == runs


def test_every_row_uses_the_learning_rate_that_is_best_on_validation_texts():
    rates = {"labels": 0.3, "logits": 0.1, "hidden": 0.2, "relations": 0.3, "logits and hidden": 0.2}

    def student(kept, row, lr, steps, seed):
        assert (kept, steps, seed) == ([0, 5], 7, 0)
        return {"lr": lr, "validation": -abs(lr - rates[row])}

    args = encoder.Settings(lrs=[0.1, 0.2, 0.3], steps=7)
    study = SimpleNamespace(name="topics", depth=6, args=args, student=student)
    assert encoder.Study.learning_rates(study, [0, 5]) == rates


def test_each_kept_block_is_compared_with_the_teachers_last_block_before_the_next_kept_one():
    hidden = encoder.criteria("topics", [0, 2, 5], 6, 4)["hidden"].terms["hidden"]
    assert [(s, t) for s, t, _ in hidden.layer_map.pairs((3, 6))] == [(0, 1), (1, 4), (2, 5)]
    relations = encoder.criteria("sentences", [0, 5], 6, 4)["relations"].terms["relations"]
    ((student, teacher, _),) = relations.layer_map.pairs()
    assert student == tuple(f"bert.encoder.layer.1.attention.self.{x}" for x in ("query", "key", "value"))
    assert teacher == tuple(f"bert.encoder.layer.5.attention.self.{x}" for x in ("query", "key", "value"))


def test_the_rests_of_texts_are_ranked_by_similarity():
    """A text is an angle in degrees, so the nearest angle is the most similar text."""

    class Circle(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            angle = torch.deg2rad(input_ids[:, 0].double())
            return torch.stack([angle.cos(), angle.sin()], -1)

    pairs = [([10], [12]), ([50], [90]), ([82], [70])]  # the right rest is ranked first, third and second
    measures = encoder.Sentences.measure(None, Circle(), pairs)
    assert measures == pytest.approx({"mrr": 100 * (1 + 1 / 3 + 1 / 2) / 3, "recall_1": 100 / 3, "recall_10": 100.0})


def test_the_contrastive_loss_equals_the_value_computed_by_hand():
    """The similarities 1, 0 and 0.6, 0.8 give log(1 + exp(-20)) and log(1 + exp(20 (0.6 - 0.8)))."""
    first, rest = [[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.0, 1.0]]
    loss = encoder.contrast(torch.tensor([*first, *rest]), None)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-20)) + math.log1p(math.exp(-4))) / 2, rel=1e-5)
