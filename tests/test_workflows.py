"""The applications with several teachers, chains, phases and summaries, at a small size."""

import json

import chain
import choose_layers
import distill_lm
import multi_teacher
import phases
import pytest
import summarise
import tiny
import torch
from parts import models, text
from transformers import AutoModelForCausalLM

import kdloss


def never(*args, **settings):
    raise AssertionError("this was done before")


def close(a, b):
    return a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-5)


def test_several_teachers_are_averaged_by_their_weights(data, teachers, tmp_path, monkeypatch):
    weights = ["--weights", "0.5,0.5", "1.0,0.0", "0.3,0.7"]
    arguments = [*tiny.flags(data, tmp_path, teachers), *weights]
    runs = multi_teacher.main(arguments)
    first = {row: x[0] for row, x in runs.items()}
    assert len(first) == 5 + 3 * 2 + 3
    assert not close(first["teacher"], first["teacher 2"])  # each was trained on its own half
    assert close(first["probabilities-1.0-0.0"], first["of-teacher-1"])
    assert close(first["logits-1.0-0.0"], first["of-teacher-1"])
    distinct = [
        "of-teacher-1",
        "of-teacher-2",
        "probabilities-0.5-0.5",
        "logits-0.5-0.5",
        "probabilities-0.3-0.7",
        "confidence",
        "entropy",
    ]
    assert len({first[row]["perplexity"] for row in distinct}) == len(distinct)
    assert first["none"]["perplexity"] > first["probabilities-0.5-0.5"]["perplexity"]
    trained, fit = [], distill_lm.fit
    monkeypatch.setattr(distill_lm, "fit", lambda *a: trained.append(a[-1]) or fit(*a))
    assert multi_teacher.main(arguments) == runs
    assert trained == []
    multi_teacher.main([*arguments, "0.9,0.1", "--average", "logits"])
    assert trained == ["logits-0.9-0.1 (0)"]


def test_teachers_from_the_command_line_are_used_and_need_one_weight_each(data, teachers, tmp_path):
    teacher = next(str(folder) for folder in teachers.iterdir() if folder.is_dir())
    several = ["--several", teacher, teacher]
    arguments = [*tiny.flags(data, tmp_path, teachers, steps=3), *several]
    first = {row: x[0] for row, x in multi_teacher.main([*arguments, "--weights", "0.5,0.5"]).items()}
    assert close(first["teacher"], first["teacher 2"])
    for row in ("probabilities-0.5-0.5", "confidence", "entropy", "learned"):  # both teachers are the same model
        assert close(first[row], first["of-teacher-1"])
    with pytest.raises(ValueError, match="--weights need one number for each of 2 teachers"):
        multi_teacher.main([*arguments, "--weights", "0.5,0.3,0.2"])


def test_in_a_chain_each_student_is_the_teacher_of_the_next(data, teachers, tmp_path, monkeypatch):
    pairs, fit = [], distill_lm.fit

    def recording(distill, student, *rest):
        pairs.append((distill.teachers[0].module.num_parameters(), student.num_parameters()))
        return fit(distill, student, *rest)

    monkeypatch.setattr(distill_lm, "fit", recording)
    arguments = [*tiny.flags(data, tmp_path, teachers), "--stages", "2x24", "1x16"]
    runs = chain.main(arguments)
    assert list(runs) == ["teacher", "2x24", "2x24 > 1x16", "direct", "direct, the chain's compute", "none"]
    teacher, middle, last = (runs[row][0]["parameters"] for row in list(runs)[:3])
    assert pairs == [(teacher, middle), (middle, last), (teacher, last), (teacher, last), (teacher, last)]
    chained = runs["2x24"][0]["teraflop"] + runs["2x24 > 1x16"][0]["teraflop"]
    direct, longer = runs["direct"][0], runs["direct, the chain's compute"][0]
    assert longer["teraflop"] == pytest.approx(chained, abs=direct["teraflop"] / direct["steps"])

    pairs.clear()  # finished stages are not trained again
    (lost,) = (tmp_path / "cells").glob("2x24-1x16-*.json")
    lost.unlink()
    again = chain.main(arguments)
    assert pairs == [(middle, last)]
    assert again["2x24 > 1x16"][0]["perplexity"] == runs["2x24 > 1x16"][0]["perplexity"]


def test_each_phase_starts_from_the_student_of_the_one_before(data, teachers, tmp_path, monkeypatch):
    epochs = ["--train-epochs", "1", "--distil-epochs", "2", "--finetune-epochs", "1", "--hardest", "0.5"]
    flags = tiny.flags(data, tmp_path, teachers, steps=None)
    runs = {row: found[0] for row, found in phases.main([*flags, *epochs]).items()}
    first, second, third, undistilled, distilled = list(runs.values())[1:]
    assert second["curve"][0]["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    assert third["curve"][0]["perplexity"] == pytest.approx(second["perplexity"], rel=1e-5)
    assert second["gained"] == pytest.approx(first["perplexity"] - second["perplexity"])
    assert second["steps"] == 2 * first["steps"]
    assert third["steps"] == pytest.approx(first["steps"] / 2, abs=1)
    total = first["steps"] + second["steps"] + third["steps"]
    assert undistilled["steps"] == distilled["steps"] == total


def test_the_hardest_blocks_are_those_of_the_highest_loss():
    tokenizer = text.train_tokenizer(tiny.SENTENCES, 300)
    model = models.gpt2(1, 16, 2, dropout=0.0, tokenizer=tokenizer, length=8)
    blocks = torch.randint(0, 290, (40, 8))
    losses = torch.tensor([model(input_ids=b[None], labels=b[None]).loss.item() for b in blocks])
    chosen = phases.hardest(model, blocks, 0.25)
    expected = blocks[losses.argsort(descending=True)[:10]]
    assert {tuple(row) for row in chosen.tolist()} == {tuple(row) for row in expected.tolist()}


def test_a_prompt_is_the_beginning_of_a_training_example():
    tokenizer = text.train_tokenizer([f"{s}{summarise.ARROW} {s}" for s in tiny.SENTENCES], 300)
    arrow = tokenizer(summarise.ARROW)["input_ids"]
    example = tokenizer(f"A text.{summarise.ARROW} Number 5", add_special_tokens=False)["input_ids"]
    ((document, summary),) = summarise.encode(tokenizer, [("A text.", "Number 5")], 48, 24)
    assert summary[: len(arrow)] == arrow
    assert [*document, *summary] == [*example, tokenizer.eos_token_id]


def test_only_summary_tokens_have_labels_and_padding_is_masked():
    batch = summarise.batch_of([([1, 2, 3], [8, 9]), ([4], [7])], pad=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 8, 9], [4, 7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9], [-100, 7, -100, -100, -100]]


def test_a_summarising_student_learns_and_is_measured(teachers, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    lines = (f'{{"article": "{s}", "title": "{s.split(",")[0]}"}}' for s in tiny.SENTENCES)
    file.write_text("\n".join(lines))
    task = "--document article --summary title --summary-length 12 --max-length 48 --keep-blocks 0,2"
    flags = tiny.flags(file, tmp_path / "out", teachers, max_length=48, steps=12)
    runs = summarise.main([*flags, *task.split()])
    assert list(runs) == ["teacher", "none", "both"]
    for method in ("none", "both"):
        found = runs[method][0]
        assert found["perplexity"] < 0.8 * found["curve"][0]["perplexity"]
        assert 0 <= found["rouge_2"] <= found["rouge_1"] <= 100
        assert found["examples"][0]["real"].startswith("Number")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/students" / method).config.n_layer == 2
    assert 0 < runs["none"][0]["teraflop"] < runs["both"][0]["teraflop"]
    monkeypatch.setattr(distill_lm, "train", never)
    assert summarise.main([*flags, *task.split()]) == runs


def test_the_perplexity_of_summaries_is_over_their_tokens_only():
    tokenizer = text.train_tokenizer(tiny.SENTENCES, 300)
    model = models.gpt2(1, 16, 2, dropout=0.0, tokenizer=tokenizer, length=8).eval()
    pairs = [([5, 6, 7], [8, 9]), ([4], [7, 11, 12])]
    values = []
    for document, summary in pairs:
        ids = torch.tensor([document + summary])
        log_probs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        values += [log_probs[i - 1, ids[0, i]] for i in range(len(document), ids.shape[1])]
    expected = torch.stack(values).neg().mean().exp().item()
    assert summarise.perplexity(model, pairs, pad=0) == pytest.approx(expected, rel=1e-5)


def test_the_default_criterion_for_summaries_uses_late_layers_and_an_alpha_of_a_fifth():
    criterion = distill_lm.criterion_for(summarise.DEFAULTS)
    assert isinstance(criterion, kdloss.FeatureKD)
    assert (criterion.alpha, criterion.terms["feature"].layer_map.layers) == (0.2, "late")


def test_an_empty_column_of_summaries_is_named_in_an_error(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"article": "A", "title": ""}\n{"article": "B", "title": null}')
    message = "0 of 2 entries have both 'article' and 'title', no more than the 200 held out: change --document"
    with pytest.raises(ValueError, match=message):
        summarise.main(["--data", str(file), "--document", "article", "--summary", "title"])


def test_choose_layers_prints_similarities_and_a_pairing(data, teachers, tmp_path, capsys, monkeypatch):
    teacher = next(str(folder) for folder in teachers.iterdir() if folder.is_dir())
    arguments = [*tiny.flags(data, tmp_path, teachers), "--teacher", teacher, "--batches", "2"]
    of_kept_blocks = choose_layers.main([*arguments, "--keep-blocks", "0,1"])
    assert of_kept_blocks.values.shape == (2, 3)
    assert of_kept_blocks.values.diagonal().tolist() == pytest.approx([1, 1], abs=1e-6)
    printed = capsys.readouterr().out
    assert "suggested: FeatureKD(pairing=[(0, 0), (1, 1)])" in printed
    assert "  0  1.00" in printed
    assert [p[:2] for p in json.loads((tmp_path / "results.json").read_text())["pairing"]] == [
        [0, 0],
        [1, 1],
    ]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    trained, fit = [], distill_lm.fit
    monkeypatch.setattr(distill_lm, "fit", lambda *a: trained.append(a[-1]) or fit(*a))
    of_trained_student = choose_layers.main(arguments)
    assert of_trained_student.values.shape == (2, 3)
    assert torch.equal(choose_layers.main(arguments).values, of_trained_student.values)
    assert trained == ["none (0)"]  # once; the second call loads the stored student
