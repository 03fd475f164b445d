"""applications/hf_trainer.py in small, and what applications/parts/trainer.py promises of the real Trainer."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import hf_trainer
import pytest
import torch
from parts import evaluation, models, text
from parts.trainer import newest_whole
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from trainer_processes import make, pair, rows, script, seven_steps, two_steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, Trainer

import kdloss

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")


@pytest.fixture(scope="module")
def start():
    """Starts a real process that has everything imported: `start(target, *args)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_processes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))

        def started(target, *args):
            process = context.Process(target=target, args=args)
            process.start()
            return process

        yield started


@pytest.fixture(scope="module")
def run(start):
    """Runs such a process to its end; its exit code."""

    def ran(target, *args):
        process = start(target, *args)
        process.join()
        return process.exitcode

    return ran


# --- the loss of one step ------------------------------------------------------------------------


class Strict(GPT2LMHeadModel):
    """A student whose forward takes no further arguments, such as num_items_in_batch."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


def trained(student, distill):
    return [p.detach().clone() for p in [*student.parameters(), *distill.criterion.parameters()]]


def exact(kind):
    """A student and its distiller in float64, so that rounding hides nothing."""
    student, distill = pair("llama" if kind == "llama" else "gpt2")
    if kind == "strict":
        student.__class__ = Strict
    for model in (student, distill.criterion, *(t.module for t in distill.teachers)):
        model.double()
    return student, distill


def two_plain_steps(student, distill, clip):
    """What two steps on one big batch come to without any Trainer: the change of each weight."""
    parameters = [*student.parameters(), *distill.criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    big = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    before = trained(student, distill)
    for _ in range(2):
        distill(student, **big).loss.backward()
        if clip:
            clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
    return changes(before, trained(student, distill))


def changes(before, after):
    return [a - b for a, b in zip(after, before, strict=True)]


def assert_near(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
        assert other.norm() > 0


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("kind", "clip"), [("gpt2", 0.0), ("gpt2", 0.5), ("llama", 0.0), ("strict", 0.0)])
def test_accumulated_micro_batches_take_the_steps_of_one_big_batch(kind, clip, micro_batches, tmp_path):
    expected = two_plain_steps(*exact(kind), clip)
    student, distill = exact(kind)
    before = trained(student, distill)
    make(
        tmp_path, student, distill, max_grad_norm=clip,
        per_device_train_batch_size=4 // micro_batches, gradient_accumulation_steps=micro_batches,
    ).train()  # fmt: skip
    assert_near(changes(before, trained(student, distill)), expected)


def test_two_processes_with_accumulation_take_the_steps_of_one_big_batch(start, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [start(two_steps_of, rank, port, str(tmp_path)) for rank in (0, 1)]
    student, distill = exact("gpt2")
    before = trained(student, distill)
    expected = two_plain_steps(student, distill, clip=0.5)
    for process in both:
        process.join()
    (first, loss), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    assert_near(changes(before, first), expected)
    student.eval()
    alone = [student(**{name: x[None] for name, x in row.items()}).loss.item() for row in rows()]
    assert loss == pytest.approx(sum(alone) / 4, rel=1e-5)
    checkpoint = tmp_path / "checkpoint-2"
    projections = load_file(checkpoint / "criterion.safetensors")
    names = [name for name, _ in distill.criterion.named_parameters()]
    assert all(torch.equal(projections[n], p) for n, p in zip(names, first[-len(names) :], strict=True))
    written = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert written.pop("trainer_state.json") > max(written.values())  # the slower process's too
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(written)


def test_without_labels_micro_batches_are_averaged(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows()]  # all as long: means of means are right

    def step(size, micro_batches):
        student, distill = pair(criterion=kdloss.FeatureKD(alpha=0.0))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        make(tmp_path, student, distill, data, ddp_find_unused_parameters=False, **settings).train()
        return trained(student, distill)

    for one, many in zip(step(4, 1), step(1, 4), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


def test_labels_that_are_all_ignored_change_nothing(tmp_path):
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows()]
    student, distill = pair()
    before = trained(student, distill)
    done = make(tmp_path, student, distill, data, logging_nan_inf_filter=False).train()
    assert done.training_loss == 0
    assert all(map(torch.equal, trained(student, distill), before))


def test_bf16_is_near_fp32_and_covers_the_teacher_but_no_weight(tmp_path):
    def step(**settings):
        student, distill = pair()
        before, seen = trained(student, distill), []
        (teacher,) = (t.module for t in distill.teachers)
        teacher.transformer.h[0].mlp.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        make(tmp_path, student, distill, max_steps=1, **settings).train()
        after = trained(student, distill)
        assert all(p.dtype == torch.float32 for p in after)
        return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]), set(seen)

    (exact, in_full), (near, in_half) = step(), step(bf16=True)
    assert (in_full, in_half) == ({torch.float32}, {torch.bfloat16})
    assert near.isfinite().all()
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < 0.03


def test_several_gpus_in_one_process_are_refused(tmp_path):
    student, distill = pair()
    arguments = make(tmp_path, student, distill).args
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        hf_trainer.DistillationTrainer(student, arguments, distill=distill)


def test_another_loss_beside_the_distillers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave out label_smoothing_factor"):
        make(tmp_path, *pair(), label_smoothing_factor=0.1)


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "strict", "llama"])
def test_evaluation_is_the_students_own_and_gathers_no_hidden_states(kind, tmp_path):
    student, distill = exact(kind)
    student.config.output_hidden_states = True
    gathered = []
    data = rows()[:1] * 3
    trainer = make(tmp_path, student, distill, data)
    trainer.compute_metrics = lambda found: gathered.append(found.predictions) or {}
    distill._run = None  # neither teacher nor capture
    loss = trainer.evaluate()["eval_loss"]
    inputs = {name: x[None] for name, x in data[0].items()}
    assert loss == pytest.approx(student.eval()(**inputs).loss.item(), rel=1e-5)
    (logits,) = gathered
    assert logits.shape == (3, 8, 61)
    trainer.compute_metrics = None
    assert trainer.predict(data).predictions.shape == logits.shape


# --- checkpoints ---------------------------------------------------------------------------------


def tensors_of(folder):
    """Every tensor in every file of a folder, by name."""
    found = {}

    def collect(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}", inner)
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                collect(f"{name}/{i}", inner)
        elif hasattr(value, "__dict__"):
            collect(name, vars(value))

    for file in Path(folder).iterdir():
        if file.suffix == ".safetensors":
            collect(file.name, load_file(file))
        elif file.suffix in (".pt", ".pth", ".bin"):
            collect(file.name, torch.load(file, weights_only=False))
    return found


def test_a_checkpoint_holds_student_and_projections_and_no_teacher(tmp_path):
    student, distill = pair()
    saving = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    make(tmp_path, student, distill, max_steps=1, **saving).train()
    checkpoint = tmp_path / "checkpoint-1"
    found = tensors_of(checkpoint)
    projections = distill.criterion.state_dict()
    for name, value in projections.items():
        assert torch.equal(found.pop(f"criterion.safetensors/{name}"), value)
    own = {name: p for name, p in student.state_dict().items() if name != "lm_head.weight"}  # tied
    for name, value in own.items():
        assert torch.equal(found.pop(f"model.safetensors/{name}"), value)
    # What is left: two moments and a counter for each weight, and states of random generators.
    shapes = sorted(tuple(x.shape) for n, x in found.items() if n.startswith("optimizer") and x.ndim)
    weights = [*student.parameters(), *projections.values()]
    assert shapes == sorted(tuple(p.shape) for p in weights for _ in range(2))
    rest = [x for n, x in found.items() if not n.startswith("optimizer")]
    assert all(x.dtype in (torch.uint8, torch.int64) for x in rest)
    (teacher,) = (t.module for t in distill.teachers)
    values = {p.flatten()[:3].sum().item() for p in teacher.parameters() if p.std() > 0}
    assert not any(x.flatten()[:3].sum().item() in values for x in tensors_of(checkpoint).values())
    for file in checkpoint.iterdir():  # and no file is larger than what was found in it
        inside = [x.nbytes + 1000 for n, x in tensors_of(checkpoint).items() if n.startswith(file.name)]
        assert file.stat().st_size < sum(inside) + 20_000


@pytest.mark.parametrize("criterion", [kdloss.VanillaKD, lambda: kdloss.FeatureKD(logit_weight=1.0)])
def test_resumed_training_ends_with_the_same_weights(criterion, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}

    def go(**settings):
        student, distill = pair(criterion=criterion(), dropout=0.1)
        trainer = make(tmp_path, student, distill, max_steps=5, per_device_train_batch_size=2, **saving)
        trainer.train(**settings)
        return trained(student, distill)

    whole = go()
    file = tmp_path / "checkpoint-2/criterion.safetensors"
    assert file.is_file() == (criterion is not kdloss.VanillaKD)
    shutil.rmtree(tmp_path / "checkpoint-5")
    for checkpoint in (str(tmp_path / "checkpoint-2"), True):
        assert all(map(torch.equal, go(resume_from_checkpoint=checkpoint), whole))
    assert all(map(torch.equal, go(resume_from_checkpoint=True), whole))  # nothing left to do


def test_a_checkpoint_that_is_overwritten_is_not_whole_on_the_way(tmp_path, monkeypatch):
    def train():
        make(tmp_path, *pair(), save_strategy="steps", save_steps=2).train()

    train()
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-2")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert (tmp_path / "checkpoint-2/model.safetensors").is_file()
    assert newest_whole(tmp_path) is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_lora_students_projections_train_and_its_base_does_not(tmp_path):
    from peft import LoraConfig, get_peft_model

    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}

    def go(**settings):
        student, distill = pair("llama", dropout=0.1)
        torch.manual_seed(3)
        student = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
        names = [n for n, _ in student.named_parameters()]
        before = trained(student, distill)
        make(tmp_path, student, distill, max_steps=4, per_device_train_batch_size=2, **saving).train(**settings)
        return names, before, trained(student, distill)

    names, before, after = go()
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        learns = i >= len(names) or "lora_" in names[i]
        assert torch.equal(a, b) != learns
    checkpoint = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "criterion.safetensors"} <= {f.name for f in checkpoint.iterdir()}
    assert not any("layer_norm" in name or ".base_layer" in name for name in tensors_of(checkpoint))
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert all(map(torch.equal, go(resume_from_checkpoint=str(checkpoint))[-1], after))


# --- killed processes, full disks ----------------------------------------------------------------


def saved(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """The folder of a run that nothing happened to, and the calls that writing a checkpoint took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(seven_steps, str(folder), "save") == 0
    return folder, int((folder / "calls").read_text())


@pytest.mark.parametrize(
    ("where", "at", "goes_on_from"),
    [
        ("step", 300, 4),
        *(("save", part, 2) for part in (0.0, 0.1, 0.3, 0.5, 0.7)),
        ("state", None, 2),
        ("rotation", None, 4),
        ("end", 1, 7),
        ("end", 0.05, 7),
    ],
)
def test_killed_anywhere_it_goes_on_and_ends_the_same(where, at, goes_on_from, run, undisturbed, tmp_path):
    reference, calls = undisturbed
    at = max(1, int(at * calls)) if isinstance(at, float) else at
    assert run(seven_steps, str(tmp_path), where, at) == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    assert run(seven_steps, str(tmp_path)) == 0
    assert (tmp_path / "starts").read_text().split() == ["0", str(goes_on_from)]
    assert saved(tmp_path / "final") == saved(reference / "final")
    assert set(saved(tmp_path / "final")) == {"model.safetensors", "criterion.safetensors"}
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-7"]
    assert not (tmp_path / "final.partial").exists()


@pytest.mark.parametrize("full_at", ["model.safetensors", "criterion.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_whole_checkpoints_only_and_says_so(full_at, run, undisturbed, tmp_path):
    reference, _ = undisturbed
    sizes = {f.name: f.stat().st_size for f in (reference / "checkpoint-7").iterdir()}
    assert run(seven_steps, str(tmp_path), None, None, sizes[full_at] - 1) == 1
    said = (tmp_path / "stderr").read_text()
    assert f"OSError: {tmp_path}/checkpoint-4 could not be written (" in said
    assert "earlier checkpoints are whole: free some space, then the same command goes on" in said
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run(seven_steps, str(tmp_path)) == 0
    assert (tmp_path / "starts").read_text().split() == ["0", "2"]
    assert saved(tmp_path / "final") == saved(reference / "final")


# --- the script ----------------------------------------------------------------------------------

WORDS = "the teacher knows what the student will learn from every page of this book"
LINES = [{"id": i, "text": f"{WORDS[i % 7 :]} {WORDS[: i % 11]}"} for i in range(40)]
NAMES = ["cross-entropy", "distilled"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES)))
    return file


@pytest.fixture(scope="module")
def command(data):
    """The flags of a small run into this folder."""

    def flags(output, *more):
        small = ["--data", data, "--steps", 5, "--max-length", 16, "--output", output]
        return [str(part) for part in (*small, *more)]

    return flags


@pytest.fixture(scope="module")
def example(command, run, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("runs") / "out"
    assert run(script, command(output)) == 0
    return output


def results(output):
    return json.loads((output / "results.json").read_text())


def test_the_script_compares_two_students_and_writes_them(example, data):
    found = results(example)
    assert list(found["students"]) == NAMES
    assert (example / "results.png").read_bytes().startswith(b"\x89PNG")
    texts = text.read_texts(str(data))
    for name, value in {n: s["perplexity"] for n, s in found["students"].items()}.items():
        student = AutoModelForCausalLM.from_pretrained(example / name)
        tokenizer = AutoTokenizer.from_pretrained(example / name)
        held_out = text.pack(text.tokenize(tokenizer, texts[: len(texts) // 10]), 16)
        assert value == pytest.approx(evaluation.perplexity(student, held_out), rel=1e-5)
        steps, curve = zip(*found["students"][name]["curve"], strict=True)
        assert steps == (1, 2, 3, 4, 5)
        assert curve[-1] == pytest.approx(value, rel=0.02)
        assert 1 < value < curve[0]
    assert saved(example / "cross-entropy").keys() == {"model.safetensors"}
    assert saved(example / "distilled").keys() == {"model.safetensors", "criterion.safetensors"}
    before, after = (load_file(example / name / "model.safetensors") for name in NAMES)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_command_again_after_any_number_of_kills_gives_the_same_results(
    example, command, start, run, tmp_path
):
    output = tmp_path / "out"
    later = "checkpoints/teacher/checkpoint-[4-8]", *(f"checkpoints/{n}/checkpoint-[2-5]" for n in NAMES)
    for begun in (later[0], "teacher*", *later[1:]):
        process = start(script, command(output))
        while process.is_alive() and not any(output.glob(begun)):
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert not (output / "results.json").exists()
    assert run(script, command(output)) == 0
    assert results(output) == results(example)
    for name in ("teacher", *NAMES):
        assert saved(output / name) == saved(example / name)
        first, *again = (output / "checkpoints" / name / "starts").read_text().split()
        assert first == "0"
        assert again
        assert "0" not in again


def test_a_full_disk_costs_no_finished_student(example, command, run, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(example, output)
    shutil.rmtree(output / "distilled")
    shutil.rmtree(output / "checkpoints/distilled/checkpoint-5")
    (output / "results.json").unlink()
    size = len(saved(example / "distilled")["model.safetensors"])
    assert run(script, command(output), size - 1) == 1
    said = output.with_suffix(".stderr").read_text()
    assert f"{output}/checkpoints/distilled/checkpoint-1 could not be written" in said
    for unwanted in ("**/*.partial", "**/distilled/checkpoint-*", "distilled", "results.json"):
        assert not list(output.glob(unwanted))
    assert run(script, command(output)) == 0
    assert results(output) == results(example)
    for name in ("teacher", "cross-entropy"):  # not written again
        for file in (output / name).iterdir():
            assert file.stat().st_mtime_ns == (example / name / file.name).stat().st_mtime_ns


def test_another_commands_results_are_not_taken_for_ones_own(example, command):
    with pytest.raises(ValueError, match=r"other settings: .*alpha 0.3, not 0.5.*--output"):
        hf_trainer.main(command(example, "--alpha", 0.5))


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """Saves a small model with the tokenizer of a teacher: depth, tokens, context."""
    tokenizer = text.train_tokenizer(text.read_texts(str(data)), 300)

    def folder(depth, context=16, more_tokens=0):
        path = tmp_path_factory.mktemp("models") / "model"
        torch.manual_seed(0)
        model = models.gpt2(depth, 16, 2, dropout=0.0, tokenizer=tokenizer, length=context)
        model.resize_token_embeddings(len(tokenizer) + more_tokens)
        models.save(model, tokenizer, path)
        return path

    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:fan_in_fan_out")
def test_a_student_deeper_than_its_teacher_learns_with_lora_in_bf16(small, command, tmp_path):
    flags = ("--teacher", small(2), "--student", small(5), "--lora", 2, "--bf16", "--seed", 3)
    found = hf_trainer.main(command(tmp_path / "out", *flags))
    assert list(found) == NAMES
    assert all(1 < student["perplexity"] < 1000 for student in found.values())
    assert (tmp_path / "out/distilled/adapter_model.safetensors").is_file()
    assert not (tmp_path / "out/teacher").exists()


def test_a_new_student_has_the_words_of_a_teacher_with_padded_embeddings(small, command, tmp_path):
    flags = ("--teacher", small(2, more_tokens=3), "--steps", 1)
    assert list(hf_trainer.main(command(tmp_path / "out", *flags))) == NAMES


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({}, {"context": 8}, "the teacher reads 8 tokens, not 16: write --max-length 8"),
        ({"context": 12}, {}, "the student reads 12 tokens, not 16: write --max-length 12"),
        ({"more_tokens": 3}, {}, "the student has a vocabulary of 303 tokens, the teacher one of 300"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_is_written(
    student, teacher, message, small, command, tmp_path
):
    flags = ("--student", small(2, **student), "--teacher", small(2, **teacher))
    with pytest.raises(ValueError, match=message):
        hf_trainer.main(command(tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps({"text": ""})] * 9, "empty"),
        ([json.dumps({"text": "a"}), "{"], "line 2 of .*bad.jsonl"),
    ],
)
def test_text_that_cannot_be_read_is_refused_before_anything_is_written(lines, message, command, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        hf_trainer.main(command(tmp_path / "out", "--data", file))
    assert not (tmp_path / "out").exists()
