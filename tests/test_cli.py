"""The interactive command in a real pseudo-terminal, and its questions."""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import cli
import pytest
import tiny
from parts import evaluation, text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(cli.__file__).parent
ASKED_FLAGS = {"--data", "--samples", "--heldout-samples", "--max-length", "--steps", "--lr"}
ERASE, DOWN, UP = "\x15", "\x1b[B", "\x1b[A"


class Terminal:
    """A process whose input and output are a pseudo-terminal."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(EXAMPLES / "cli.py"), *map(str, arguments)]
        ends = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **ends)
        os.close(slave)
        self.raw, self.read = b"", 0

    @property
    def text(self):
        """All text shown so far, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw.decode()).replace("\r\n", "\n")

    def shows(self, words):
        """Wait for these words, after the words of the last wait."""
        while words not in self.text[self.read :]:
            assert self.more(), f"{words!r} was never shown:\n{self.text[self.read :]}"
        self.read = self.text.index(words, self.read) + len(words)

    def more(self):
        """Read available output; False if the process has ended or stays silent."""
        if not select.select([self.master], [], [], 60)[0]:
            return False
        try:
            self.raw += (new := os.read(self.master, 65536))
        except OSError:  # the other end of the terminal is closed
            return False
        return bool(new)

    def answer(self, question, keys):
        self.shows(f"? {question}")
        os.write(self.master, keys.encode())

    def ends(self):
        while self.more():
            pass
        os.close(self.master)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A complete session with some invalid answers: its folder, the text on the screen and its exit code."""
    folder = tmp_path_factory.mktemp("cli")
    file = tiny.data(folder)
    flags = tiny.flags(file, folder / "runs", folder / "teachers")
    remaining = [
        part for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] not in ASKED_FLAGS for part in pair
    ]
    terminal = Terminal(*remaining)
    terminal.answer("data: ", "missing.jsonl\r")
    terminal.shows("there is no file 'missing.jsonl'")
    terminal.answer("data: ", f"{ERASE}{file}\r")
    terminal.answer("teacher: ", "\r")
    terminal.answer("samples: ", "many\r")
    terminal.shows("Error parsing --samples: invalid literal for int() with base 10: 'many'")
    terminal.answer("samples: ", f"{ERASE}399\r")
    terminal.answer("heldout samples: ", "399\r")
    terminal.answer("max length: ", "16\r")
    terminal.shows("all 399 texts are held out")
    terminal.answer("samples: ", "\r")
    terminal.answer("heldout samples: ", f"{ERASE}40\r")
    terminal.answer("max length: ", "\r")
    terminal.answer("student: ", "0,9\r")
    terminal.shows("block 9 does not exist: 3 blocks")
    terminal.answer("student: ", f"{ERASE}\r")
    terminal.shows("method       vanilla")
    terminal.answer("method: ", f"{DOWN}{DOWN}\r")
    terminal.shows("method       both")
    terminal.answer("temperature: ", "-1\r")
    terminal.answer("alpha: ", "0.4\r")
    terminal.shows("temperature must be finite and above 0, got -1.0")
    terminal.answer("temperature: ", f"{ERASE}2\r")
    terminal.answer("alpha: ", "\r")
    terminal.answer("layers: ", "all\r")
    terminal.answer("pairing: ", "\r")
    terminal.answer("distance: ", f"{UP}{UP}\r")
    terminal.answer("epochs: ", "4\r")
    terminal.answer("batch size: ", "\r")
    terminal.answer("lr: ", "5e-3\r")
    terminal.answer("baseline: ", "y")
    terminal.answer("Train it?", "y")
    code = terminal.ends()
    return folder, terminal.text, code


def test_the_answers_are_the_settings_that_were_used(session):
    folder, _, code = session
    assert code == 0
    used = json.loads((folder / "runs" / "results.json").read_text())["settings"]
    answered = {
        "method": "both", "data": str(folder / "numbers.jsonl"), "teacher": None, "samples": 399,
        "heldout_samples": 40, "max_length": 16, "student": None, "keep_blocks": None, "temperature": 2.0,
        "alpha": 0.4, "layers": "all", "pairing": "uniform", "distance": "cwd", "epochs": 4,
        "batch_size": 8, "lr": 5e-3, "baseline": True,
    }  # fmt: skip
    assert {name: used[name] for name in answered} == answered


def test_teacher_and_student_are_compared_before_training_and_measured_before_and_after(session):
    folder, shown, _ = session
    runs = json.loads((folder / "runs" / "results.json").read_text())["runs"]
    assert list(runs) == ["teacher", "none", "both"]
    (both,), (none,), (teacher,) = runs["both"], runs["none"], runs["teacher"]
    before, _, after = shown.partition("Train it?")
    for row, found in {"teacher": teacher, "student": both}.items():
        assert re.search(rf"{row} +{found['parameters']:,} ", before)
    assert f"{teacher['parameters'] / both['parameters']:.2f}x\n" in before
    assert both["before"]["perplexity"] == both["curve"][0]["perplexity"] == none["curve"][0]["perplexity"]
    assert both["perplexity"] < none["curve"][0]["perplexity"]
    numbers = [f"{x['perplexity']:.1f}" for x in (teacher, both["before"], none, both)]
    assert re.search("held-out perplexity +" + " +".join(map(re.escape, numbers)), after)
    assert (folder / "runs" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_printed_line_loads_the_model_that_was_measured(session):
    folder, shown, _ = session
    (written,) = re.findall(r'AutoModelForCausalLM.from_pretrained\("(.*)"\)', shown)
    student = AutoModelForCausalLM.from_pretrained(written)
    (both,) = json.loads((folder / "runs" / "results.json").read_text())["runs"]["both"]
    heldout = text.read_texts(str(folder / "numbers.jsonl"), limit=399)[-40:]
    blocks = text.pack(text.tokenize(AutoTokenizer.from_pretrained(written), heldout), 16)
    assert evaluation.perplexity(student, blocks) == pytest.approx(both["perplexity"], rel=1e-4)


def test_the_printed_command_repeats_the_run_without_a_terminal_and_after_sigkill(session, tmp_path):
    folder, screen, _ = session
    (shown,) = re.findall(r"^  python (.*)$", screen, re.MULTILINE)
    _, *arguments = shlex.split(shown)
    again = [*arguments, "--output", str(tmp_path), "--save-every", "0"]
    killed = Terminal(*again)
    killed.shows("both (0): ")
    while not list((tmp_path / "cells").glob("both-*.checkpoints/step-*5.pt")):
        assert killed.process.poll() is None
    killed.process.kill()
    assert killed.ends() == -signal.SIGKILL
    assert "? " not in killed.text
    assert not list((tmp_path / "cells").glob("both-*.json"))
    command = [sys.executable, str(EXAMPLES / "cli.py"), *again]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the session; more threads would change the last bits
    ends = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    resumed = subprocess.run(command, env=one_thread, check=True, **ends)
    assert not re.search(r"both \(0\):   0%\|.* 0/", resumed.stderr)  # it didn't start again from the first step
    first, second = (next(output.glob("students/both-*")) for output in (folder / "runs", tmp_path))
    ours, theirs = (load_file(student / "model.safetensors") for student in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_control_c_at_a_question_ends_without_a_traceback_and_prints_the_answers_as_flags(tmp_path):
    terminal = Terminal("--epochs", 3)
    terminal.answer("data: ", f"{tiny.data(tmp_path)}\r")
    terminal.answer("teacher: ", "\x03")
    assert terminal.ends() == 130
    assert "Traceback" not in terminal.text
    assert terminal.text.strip().endswith(f"cli.py --epochs 3 --data={tmp_path / 'numbers.jsonl'}")


# -- in this process: the questions, and errors without a terminal --


@pytest.fixture
def questions(monkeypatch):
    """A simulated terminal: the names of the questions so far, and the answers that it will give."""
    seen, answers = [], {}

    def prompt(words, *_, **__):
        name = words.partition(":")[0]
        seen.append(name)
        return SimpleNamespace(unsafe_ask=lambda: answers.get(name, ""))

    for kind in ("text", "select", "confirm"):
        monkeypatch.setattr(cli.questionary, kind, prompt)
    monkeypatch.setattr(cli.questionary, "print", lambda words, **_: print(words))
    monkeypatch.setattr(cli.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    return seen, answers


def flags_without(file, output, *names):
    """The tiny settings as flags, without those in `names`."""
    flags = tiny.flags(file, output)
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in names for part in pair]


@pytest.mark.parametrize(
    ("method", "of_method"),
    [
        ("none", []),
        ("vanilla", ["temperature", "alpha"]),
        ("feature", ["alpha", "layers", "pairing", "distance"]),
        ("both", ["temperature", "alpha", "layers", "pairing", "distance"]),
    ],
)
def test_only_questions_of_the_method_that_have_no_flag_are_asked(questions, tmp_path, method, of_method):
    seen, answers = questions
    answers |= {"method": method, "baseline": False, "student": "0,-1"}
    flags = flags_without(tiny.data(tmp_path), tmp_path, "--lr")
    settings, models = cli.Interview(flags).hold()
    baseline = [] if method == "none" else ["baseline"]
    assert seen == ["teacher", "student", "method", *of_method, "batch size", "lr", *baseline]
    assert (settings.method, settings.keep_blocks, settings.lr) == (method, [0, -1], 1e-3)
    assert settings.baseline is (method == "none")
    assert models.student.config.kept_blocks == {"transformer.h": [0, 2]}


def test_empty_answers_take_the_suggestions_for_the_chosen_method(questions, tmp_path, capsys):
    _, answers = questions
    answers |= {"method": "both", "student": "0,-1", "baseline": False, "alpha": "0.6"}
    settings, models = cli.Interview(flags_without(tiny.data(tmp_path), tmp_path)).hold()
    safe, both = (cli.kdloss.suggest(models.student, models.setup.teacher, goal=goal) for goal in ("safe", "quality"))
    assert capsys.readouterr().out == f"\n{safe}\n\n\n{both}\n\n"
    chosen = settings.temperature, settings.alpha, settings.layers, settings.pairing, settings.distance
    assert chosen == (1.0, 0.6, "auto", "kept", "normalized_mse")


def test_no_layers_are_suggested_if_pairs_of_layers_are_set(tmp_path):
    flags = flags_without(tiny.data(tmp_path), tmp_path)
    settings, _ = cli.Interview([*flags, "--method=feature", "--pairing=0:1,1:2"]).hold()
    assert (settings.layers, settings.pairing, settings.alpha) == (None, [(0, 1), (1, 2)], 0.3)


def test_nothing_is_suggested_for_training_without_a_teacher(tmp_path, capsys):
    cli.Interview([*flags_without(tiny.data(tmp_path), tmp_path), "--method=none"]).hold()
    assert capsys.readouterr().out == ""


def test_a_dataset_by_name_has_questions_about_its_configuration_and_split(questions, tmp_path):
    seen, answers = questions
    (tmp_path / "set").mkdir()
    tiny.data(tmp_path / "set").rename(tmp_path / "set" / "test.jsonl")
    (tmp_path / "set" / "README.md").write_text("---\nlanguage: en\n---\n")
    answers |= {"method": "none", "data": str(tmp_path / "set"), "split": "test"}
    settings, _ = cli.Interview(flags_without(None, tmp_path, "--data")).hold()
    assert seen[:4] == ["data", "data config", "split", "teacher"]
    assert (settings.data, settings.split) == (str(tmp_path / "set"), "test")


def test_a_refused_flag_becomes_a_question(questions, tmp_path):
    seen, answers = questions
    answers |= {"method": "none", "data": str(tiny.data(tmp_path))}
    (tmp_path / "texts.md").write_text("# Texts")
    settings, _ = cli.Interview(flags_without(tmp_path / "texts.md", tmp_path)).hold()
    assert seen[:2] == ["data", "teacher"]  # there is no question about the split of a .md file
    assert settings.data == answers["data"]


def test_an_answer_replaces_a_refused_flag(questions, tmp_path):
    seen, answers = questions
    answers |= {"method": "none", "student": "0,-1", "lr": ""}
    flags = [*flags_without(tiny.data(tmp_path), tmp_path, "--lr"), "--student", str(tmp_path / "missing"), "--lr=-1"]
    settings, _ = cli.Interview(flags).hold()
    assert seen == ["teacher", "student", "method", "batch size", "lr"]
    assert (settings.student, settings.keep_blocks, settings.lr) == (None, [0, -1], 1e-3)


def test_nothing_is_asked_if_every_question_has_a_flag(questions, session, tmp_path):
    seen, _ = questions
    (teacher,) = (session[0] / "teachers").iterdir()
    more = "--method vanilla --temperature 1 --alpha 0.2 --batch-size 8 --no-baseline --keep-blocks 0"
    rows = cli.main([*flags_without(tiny.data(tmp_path), tmp_path), "--teacher", str(teacher), *more.split()])
    assert seen == []
    assert list(rows) == ["teacher", "before", "vanilla"]
    assert rows["vanilla"]["steps"] == 20


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--data missing.jsonl", "there is no file 'missing.jsonl'"),
        ("--data /", "'/' is a folder but not a dataset"),
        ("--heldout-samples 400", "all 400 texts are held out"),
        ("--teacher missing.gguf", "there is no file 'missing.gguf'"),
        ("--student-width 15", "does not divide into 2 heads"),
        ("--keep-blocks 0,7", "block 7 does not exist: 3 blocks"),
        ("--alpha 1.5", "alpha must lie between 0 and 1, got 1.5"),
        ("--method feature --layers 5", "block 5 does not exist: 2 blocks"),
        ("--method feature --student-layers 4 --pairing same --layers all", "but the teacher has 3 blocks"),
        ("--method both --distance fsp", "fsp compares two layers side by side"),
        ("--lr -1", "Invalid learning rate"),
    ],
)
def test_without_a_terminal_invalid_settings_stop_the_command_before_training(tmp_path, flags, reason):
    output = tmp_path / "runs"
    with pytest.raises(SystemExit, match=re.escape(reason)):
        cli.main([*tiny.flags(tiny.data(tmp_path), output), *flags.split()])
    assert not output.exists()


def test_a_student_of_another_vocabulary_is_refused_before_training(session, tmp_path):
    (student,) = (session[0] / "runs" / "students").glob("both-*")
    flags = tiny.flags(tiny.data(tmp_path), tmp_path / "runs", vocabulary=310)
    with pytest.raises(SystemExit, match="the student has a vocabulary of 300 tokens"):
        cli.main([*flags, "--student", str(student)])
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_training_prints_the_command_that_resumes_it(monkeypatch, tmp_path, capsys):
    def train(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.distill_lm, "train", train)
    flags = tiny.flags(tiny.data(tmp_path), tmp_path / "runs")
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    assert stopped.value.code == 130
    shown = capsys.readouterr()
    line = f"--yes {shlex.join(flags)}"
    assert line in shown.out  # printed before training, so it is on the screen even after SIGKILL
    assert line in shown.err
