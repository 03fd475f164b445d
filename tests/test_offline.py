"""The examples offline_teacher.py and on_policy.py at a small size."""

import weakref
from dataclasses import replace

import distill_lm
import numpy as np
import offline_teacher
import on_policy
import oracles
import pytest
import tiny
import torch
from families import build
from parts import evaluation
from safetensors.torch import load_file

import kdloss


def never(*args, **settings):
    raise AssertionError("this was done before")


def test_a_student_learns_the_same_from_the_cache_as_live_and_needs_no_teacher_in_memory(
    data, teachers, tmp_path, monkeypatch
):
    train, prepare, alive = distill_lm.train, offline_teacher.prepare, []

    def watched(*args):
        setup = prepare(*args)
        alive.append(weakref.ref(setup.teacher))
        return setup

    def training(distill, *args, **settings):
        if isinstance(distill, offline_teacher.FromCache):
            assert alive[-1]() is None
        return train(distill, *args, **settings)

    monkeypatch.setattr(offline_teacher, "prepare", watched)
    monkeypatch.setattr(distill_lm, "train", training)
    arguments = [*tiny.flags(data, tmp_path, teachers), "--student-blocks", "40", "--ks", "300", "4"]  # 300 is all
    runs = {row: found[0] for row, found in offline_teacher.main(arguments).items()}
    assert list(runs) == ["teacher", "none", "live", "k 300", "k 4"]
    assert runs["k 300"]["curve"][0]["perplexity"] == runs["live"]["curve"][0]["perplexity"]
    assert runs["k 300"]["perplexity"] == pytest.approx(runs["live"]["perplexity"], rel=1e-3)
    assert runs["none"]["perplexity"] != pytest.approx(runs["live"]["perplexity"], rel=1e-2)
    assert runs["k 300"]["kd_from_cache"] == pytest.approx(runs["k 300"]["kd_live"], rel=1e-3)
    assert runs["k 4"]["kd_from_cache"] < runs["k 4"]["kd_live"]  # fewer classes can only lower the divergence
    assert runs["k 4"]["cache_megabytes"] < 0.1 * runs["k 300"]["cache_megabytes"]
    assert runs["k 4"]["samples"] > 1
    assert runs["k 300"]["teraflop"] == runs["none"]["teraflop"] < runs["live"]["teraflop"]  # no passes of the teacher
    monkeypatch.setattr(distill_lm, "train", never)
    again = offline_teacher.main(arguments)
    assert {row: found[0] for row, found in again.items()} == runs


def test_feature_methods_are_refused_with_a_cache(data, teachers, tmp_path):
    with pytest.raises(ValueError, match="--method feature needs the teacher"):
        offline_teacher.main([*tiny.flags(data, tmp_path, teachers), "--method", "feature"])


def test_a_student_learns_on_its_own_text_and_repeating_the_command_trains_nothing(
    data, teachers, tmp_path, monkeypatch
):
    settings = {"start_epochs": 2, "divergence": "reverse_kl"}
    arguments = [*tiny.flags(data, tmp_path, teachers, **settings), "--lambdas", "0", "0.5", "1"]
    runs = {row: found[0] for row, found in on_policy.main(arguments).items()}
    assert list(runs) == ["teacher", "start", "cross-entropy goes on", "lambda 0", "lambda 0.5", "lambda 1"]
    for row in list(runs)[2:]:
        assert runs[row]["curve"][0]["perplexity"] == pytest.approx(runs["start"]["perplexity"])
    assert len({round(found["perplexity"], 3) for found in runs.values()}) == 6
    never_writes, half, always = (runs[f"lambda {x}"]["teraflop"] for x in ("0", "0.5", "1"))
    assert runs["cross-entropy goes on"]["teraflop"] < never_writes < always
    assert half == pytest.approx((never_writes + always) / 2)
    assert runs["lambda 1"]["samples"] < runs["start"]["samples"]  # the teacher finds its samples more probable
    monkeypatch.setattr(distill_lm, "train", never)
    again = on_policy.main(arguments)
    assert {row: found[0] for row, found in again.items()} == runs


def test_a_sample_follows_the_students_predictions_and_begins_with_the_prompt():
    student = build("gpt2", depth=2).train()
    with torch.no_grad():
        student.transformer.wte.weight.mul_(12)
    prompts = torch.tensor([[3, 4, 5]]).expand(4000, 3)
    torch.manual_seed(0)
    written = evaluation.sample(student, prompts, 5)
    assert written.shape == (4000, 5)
    assert torch.equal(written[:, :3], prompts)
    assert student.training
    student.eval()
    with torch.no_grad():
        first = student(input_ids=prompts[:1]).logits[0, -1].double().softmax(-1).numpy()
    seen = np.bincount(written[:, 3], minlength=len(first)) / 4000
    assert 0.1 < first.max() < 0.9  # so greedy or uniform sampling would fail below
    assert abs(seen - first).sum() < 0.1
    token = int(first.argmax())
    after = written[written[:, 3] == token]
    with torch.no_grad():  # sampled with stored keys and values, computed here without them
        second = student(input_ids=after[:1, :4]).logits[0, -1].double().softmax(-1).numpy()
    assert abs(np.bincount(after[:, 4], minlength=len(second)) / len(after) - second).sum() < 0.25


@pytest.mark.parametrize("sampled", [0.0, 1.0])
def test_the_loss_of_a_step_is_the_divergence_on_the_continuations_only(sampled):
    teacher, student = build("gpt2", width=24).eval(), build("gpt2", depth=2, seed=1).eval()
    tokens = torch.randint(0, 61, (3, 8))
    loop = on_policy.OnPolicy(
        kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, alpha=0.0, divergence=kdloss.divergences.reverse_kl)),
        sampled,
    )
    loop.prepare(student)
    torch.manual_seed(5)
    loss = loop(student, tokens, tokens).loss
    if sampled:
        torch.manual_seed(5)
        torch.rand(())  # the draw that decides whether to sample
        written = evaluation.sample(student, tokens[:, :4], 8)
        assert not torch.equal(written, tokens)
        tokens = written
    with torch.no_grad():  # logits at 3 to 6 predict the tokens at 4 to 7
        s, t = (model(input_ids=tokens).logits[:, 3:7].double().numpy() for model in (student, teacher))
    assert loss.item() == pytest.approx(oracles.reverse_kl(s, t).mean(), rel=1e-5)


def test_a_lambda_above_one_is_refused(data, teachers, tmp_path):
    with pytest.raises(ValueError, match=r"--lambdas are shares between 0 and 1, got \[1.5\]"):
        on_policy.main([*tiny.flags(data, tmp_path, teachers), "--lambdas", "0", "1.5"])


def test_beta_is_passed_to_jsd_but_not_to_forward_kl():
    args = replace(on_policy.DEFAULTS, beta=0.3)
    assert on_policy.divergence(args).keywords == {"beta": 0.3}
    args = replace(on_policy.DEFAULTS, divergence="forward_kl")
    assert on_policy.divergence(args) is kdloss.divergences.forward_kl


def test_a_run_that_is_interrupted_while_it_samples_resumes_to_the_same_student(data, teachers, tmp_path, monkeypatch):
    settings = {"start_epochs": 1, "divergence": "reverse_kl", "steps": 8, "save_every": 0}

    def command(output):
        return [*tiny.flags(data, tmp_path / output, teachers, **settings), "--lambdas", "1"]

    undisturbed = on_policy.main(command("undisturbed"))["lambda 1"][0]
    with monkeypatch.context() as patched:
        original, calls = evaluation.sample, []

        def interrupted(*args):
            calls.append(len(args) == 3)  # in training; evaluation also passes a generator
            if sum(calls) == 3 and calls[-1]:
                raise KeyboardInterrupt
            return original(*args)

        patched.setattr(evaluation, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            on_policy.main(command("interrupted"))
    assert list((tmp_path / "interrupted/cells").glob("lambda-1*.checkpoints/*.pt"))
    found = on_policy.main(command("interrupted"))["lambda 1"][0]
    ours, theirs = (load_file(f"{x['student']}/model.safetensors") for x in (found, undisturbed))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert found["samples"] == undisturbed["samples"]
