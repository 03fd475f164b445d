"""Two gloo processes give the results of one; after SIGKILL the script resumes and gives the same result."""

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import distributed
import psutil
import pytest
import torch
import two_processes
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from parts import evaluation, models, text

EXAMPLES = Path(distributed.__file__).parent
SENTENCES = [
    f"Number {i} is {'even' if i % 2 == 0 else 'odd'}, and the number {i + 1} follows right after it."
    for i in range(50)
]
SMALL = {
    "heldout-samples": 5,
    "max-length": 16,
    "batch-size": 4,
    "steps": 12,
    "every": 4,
    "lr": 5e-3,
    "vocabulary": 300,
}
SMALL = [f"--{name}={value}" for name, value in SMALL.items()]
STRATEGIES = {"fsdp": (["--fsdp"], (distributed.dcp, "save")), "ddp": ([], (distributed.Accelerator, "save_state"))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run one process; return flags with text and teacher, its output folder, its results, a student with dropout."""
    folder = tmp_path_factory.mktemp("given")
    file = folder / "numbers.jsonl"
    file.write_text("\n".join(json.dumps({"text": sentence}) for sentence in SENTENCES))
    torch.set_num_threads(1)
    output = folder / "one"
    folders = ["--output", str(output), "--teachers", str(folder / "teachers")]
    results = distributed.main(["--data", str(file), *SMALL, *folders])
    (teacher,) = (folder / "teachers").iterdir()
    _, tokenizer = models.load(str(teacher))
    torch.manual_seed(1)
    models.save(models.gpt2(2, 16, 2, dropout=0.2, tokenizer=tokenizer, length=16), tokenizer, folder / "student")
    flags = ["--data", str(file), "--teacher", str(teacher), *SMALL]
    return flags, output, results, folder / "student"


def start(output, flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, two_processes.__file__, str(output), *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process):
    """Send SIGKILL to the launcher and to every process that it started."""
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()


def test_two_processes_killed_and_resumed_under_fsdp_and_ddp_match_one_undisturbed_process(trained, tmp_path):
    """Run the same command three times, twice ended by SIGKILL; in one test, because processes start slowly."""
    flags, single, results, _ = trained
    for strategy in STRATEGIES:
        process = start(tmp_path, flags)
        checkpoint = tmp_path / strategy / "checkpoints/alone/step-00000004"
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.005)
        kill(process)
        assert checkpoint.exists()
        assert not (tmp_path / strategy / "results.json").exists()
    last = start(tmp_path, flags)
    printed = last.communicate()[0]
    assert last.returncode == 0, printed
    assert "alone:   0%" not in printed  # both resume, neither starts again
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case, (_, sharded, *rest) in two_processes.CASES.items():
        ours = [rank[case] for rank in ranks]
        assert_gradients_match_one_process(ours, two_processes.train(None, False, *rest))
        assert_all_ranks_have_the_same_weights(*ours)
        assert [result["teacher in shards"] for result in ours] == [sharded, sharded]
    for strategy in STRATEGIES:
        assert_results_match_one_process(tmp_path / strategy, single, results)


def assert_gradients_match_one_process(ranks, single):
    assert any(name.startswith("criterion.terms.feature.projections") for name in single["weights"])
    for result in ranks:
        torch.testing.assert_close(result["gradients"], single["gradients"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(result["norms"], single["norms"], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(result["weights"], single["weights"], rtol=1e-5, atol=1e-7)


def assert_all_ranks_have_the_same_weights(first, second):
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


def assert_results_match_one_process(folder, single, results):
    saved = json.loads((folder / "results.json").read_text())
    assert saved["perplexity"] == pytest.approx(results, rel=1e-4)
    assert [step for step, _ in saved["curves"]["distilled"]] == [4, 8, 12]
    tokens = torch.arange(32).view(2, 16)
    for name in results:  # not weights: AdamW makes full steps even of rounding errors
        ours, theirs = (models.load(str(saved_in / name))[0].eval()(tokens).logits for saved_in in (folder, single))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def _a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_interrupted_while_saving_ends_bit_for_bit_like_an_undisturbed_one(
    trained, tmp_path, monkeypatch, strategy
):
    flags, _, _, student = trained
    more, saver = STRATEGIES[strategy]
    flags = [*flags, *more, "--student", str(student)]  # its dropout must be the same after resuming
    undisturbed = distributed.main([*flags, "--output", str(tmp_path / "whole")])
    flags, checkpoints = [*flags, "--output", str(tmp_path / "broken")], tmp_path / "broken/checkpoints"

    full = OSError(28, "No space left on device")
    monkeypatch.setattr(*saver, failing_save(getattr(*saver), number=5, error=full))  # the distilled student's second
    with pytest.raises(OSError, match=r"could not be written, .* MB are free there.*same command again"):
        restart(flags)
    assert [path.name for path in (checkpoints / "distilled").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    monkeypatch.setattr(*saver, failing_save(getattr(*saver), number=1, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        restart(flags)
    assert [path.parent.parent.name for path in checkpoints.glob("**/half")] == ["distilled"]
    monkeypatch.undo()
    assert restart(flags) == undisturbed
    ours, theirs = ((tmp_path / run / "distilled/model.safetensors").read_bytes() for run in ("broken", "whole"))
    assert ours == theirs
    remaining = sorted(folder.name for folder in (checkpoints / "distilled").iterdir())
    assert remaining == ["step-00000008", "step-00000012"]


def failing_save(save, number, error):
    """Return a function that saves, until call `number` starts to write and raises `error`."""
    calls = itertools.count(1)

    def saving(*args, **kwargs):
        if next(calls) < number:
            return save(*args, **kwargs)
        folder = Path(kwargs.get("checkpoint_id") or args[-1])
        folder.mkdir()
        (folder / "half").write_bytes(b"")
        raise error

    return saving


def restart(flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    return distributed.main(flags)


def test_saved_students_have_the_measured_perplexity(trained):
    flags, output, results, _ = trained
    unseen = text.read_texts(flags[1])[-5:]
    for name, perplexity in results.items():
        student, tokenizer = models.load(str(output / name))
        blocks = text.pack(text.tokenize(tokenizer, unseen), 16)
        full_batches = blocks[: len(blocks) // 4 * 4]
        assert evaluation.perplexity(student, full_batches) == pytest.approx(perplexity, rel=1e-4)
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_with_other_flags_is_refused(trained):
    flags, output, _, _ = trained
    with pytest.raises(ValueError, match=r"holds a run with other settings: .*seed 0, not 3.*another --output"):
        distributed.main([*flags, "--seed", "3", "--output", str(output)])


def test_a_batch_size_not_divisible_by_the_accumulation_steps_is_refused(trained, tmp_path):
    flags, _, _, _ = trained
    with pytest.raises(ValueError, match=r"batch of 4 does not divide into 3 .*--batch-size 6"):
        distributed.main([*flags, "--accumulate", "3", "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_accelerate_reads_the_deepspeed_configuration():
    config = load_config_from_file(str(EXAMPLES / "deepspeed_zero3.yaml"))
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == 3
    assert set(config.deepspeed_config) <= set(vars(launch_command_parser().parse_args(["script.py"])))
