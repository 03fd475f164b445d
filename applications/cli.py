"""Distil a language model interactively: the script asks questions.

    python applications/cli.py                                            # asks for everything
    python applications/cli.py --teacher my/teacher --data texts.jsonl    # asks for the rest
    python applications/cli.py --yes                                      # asks nothing

Every question is also a flag; most flags and the training itself are those of distill_lm.py. An empty answer takes the
default. For method, temperature, alpha and layers the default is what kdloss.suggest suggests for student and teacher.
If the run is killed, the same command with the same answers resumes it.
"""

import io
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import distill_lm
import questionary
from parts import cells, evaluation, models, options, report, text
from parts.setup import Setup, prepare, student_of
from prompt_toolkit.completion import PathCompleter
from torch.optim import AdamW
from transformers import PreTrainedModel
from typing_extensions import Doc

import kdloss
from kdloss.layers.select import STRATEGIES


@dataclass(kw_only=True)
class Settings(distill_lm.Settings):
    """The settings of distill_lm.py, and two more."""

    yes: Annotated[bool, Doc("ask nothing; settings without a flag take their defaults")] = False
    baseline: Annotated[bool, Doc("also train the student without a teacher")] = True


DEFAULTS = Settings(output=Path("runs/cli"), samples=6000)
TYPES = get_type_hints(Settings, include_extras=True)


def readable(args: Settings, seen: SimpleNamespace) -> None:
    """Raise an error unless the text can be read."""
    source = {"config": args.data_config, "split": args.split, "column": args.text_column}
    text.read_texts(args.data, **source, limit=args.samples)


def loadable(args: Settings, seen: SimpleNamespace) -> None:
    """Raise an error if there is a teacher to load and it can't be loaded."""
    if args.teacher is not None:
        models.load(args.teacher)


def teachable(args: Settings, seen: SimpleNamespace) -> None:
    """Raise an error unless the teacher can read the text. A new teacher is made, but not trained here."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        rehearsal = replace(args, teachers=Path(folder))
        seen.setup = prepare(rehearsal, train=lambda *_, **__: None)


def makeable(args: Settings, seen: SimpleNamespace) -> None:
    """Raise an error unless the student can be made and has the teacher's vocabulary."""
    seen.student = student_of(args, seen.setup.teacher, seen.setup.tokenizer)


def mixable(args: Settings, seen: SimpleNamespace) -> None:
    """Raise an error unless temperature and alpha are valid."""
    distill_lm.criterion_for(replace(args, method="vanilla"))


def distillable(args: Settings, seen: SimpleNamespace) -> None:
    """Raise an error unless the loss finds its layers in both models."""
    kdloss.Distiller(seen.setup.teacher, distill_lm.criterion_for(args)).prepare(seen.student)


def trainable(args: Settings, seen: SimpleNamespace) -> None:
    """Raise an error unless the optimizer accepts its settings."""
    AdamW(seen.student.parameters(), lr=args.lr)


GROUPS = [  # questions that are checked together, before the next group is asked
    (["data", "data_config", "split"], readable),
    (["teacher"], loadable),
    (["samples", "heldout_samples", "max_length"], teachable),
    (["student"], makeable),
    (["method"], None),
    (["temperature", "alpha"], mixable),
    (["layers", "pairing", "distance"], distillable),
    (["epochs", "batch_size"], None),
    (["lr"], trainable),
    (["baseline"], None),
]
PATHS = {"data", "teacher", "student"}
GOALS = {"vanilla": "safe", "feature": "speed", "both": "quality"}  # of kdloss.suggest, for each method
STYLE = questionary.Style([("selected", "noreverse"), ("highlighted", "bold")])  # an arrow marks the choice


def matters(name: str, args: Settings) -> bool:
    """Whether a question matters, given the other answers."""
    try:
        dataset = args.data is not None and text.kind_of(args.data) is None
    except ValueError:  # not a text file; the check after these questions says so
        dataset = False
    open_by_name = {
        "data_config": dataset,
        "split": dataset,
        "epochs": args.steps is None,
        "baseline": args.method != "none",
    }
    return open_by_name.get(name, name not in distill_lm.UNUSED[args.method])


def flag(name: str, answer: str | bool) -> list[str]:
    """An answer as a flag of the command line."""
    if answer == "":
        return []
    dashed = name.replace("_", "-")
    if isinstance(answer, bool):
        return [f"--{dashed}" if answer else f"--no-{dashed}"]
    if name == "student" and (answer in STRATEGIES or isinstance(options.blocks_or_names(answer)[0], int)):
        return [f"--keep-blocks={answer}"]
    return [f"--{dashed}={answer}"]


def words(name: str, default: Any) -> str:
    """The words of a question: the help text of its flag, and the default."""
    said = {n: next(x.documentation for x in get_args(TYPES[n]) if isinstance(x, Doc)) for n in (name, "keep_blocks")}
    also = f"; or {said['keep_blocks']}" if name == "student" else ""
    here = said[name] if default is None else said[name].partition("; otherwise")[0]
    shown = "" if default is None or isinstance(default, bool) else f" ({default})"
    question = f"{name.replace('_', ' ')}: {here}{shown}{also}"
    return textwrap.fill(question, shutil.get_terminal_size().columns - 24, subsequent_indent="  ")


def question(flag: str) -> str:
    """The question that a flag answers."""
    name = flag.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    return "student" if name == "keep_blocks" else name  # two flags, one question


class Interview:
    """The flags of the command line, and the answers as flags; both are parsed and checked in the same way."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments, self.answers = list(arguments), {}
        self.defaults, self.advice = DEFAULTS, None
        self.given = {question(part) for part in self.arguments if part.startswith("--")}
        self.asks = sys.stdin.isatty() and not self.settings().yes

    def command(self, complete: bool) -> str:
        """The command that repeats the run; without questions if they were all answered."""
        yes = ["--yes"] if complete and "--yes" not in self.arguments else []
        return shlex.join(["python", sys.argv[0], *yes, *self.flags()])

    def forget(self, name: str) -> None:
        """Drop the answer to a question, also if it was given as a flag."""
        kept, dropped = [], False
        for part in self.arguments:
            dropped = question(part) == name if part.startswith("--") else dropped
            kept += [] if dropped else [part]
        self.arguments, self.given = kept, self.given - {name}

    def flags(self) -> list[str]:
        """All flags, as if every answer had been given on the command line."""
        return [*self.arguments, *(part for name, answer in self.answers.items() for part in flag(name, answer))]

    def settings(self) -> Settings:
        """The settings so far: flags, answers, and defaults for the rest."""
        args = options.read(self.defaults, self.flags(), __doc__)
        said = "layers" in self.given or self.answers.get("layers")
        # Explicit pairs already name the layers.
        return args if said or isinstance(args.pairing, str) else replace(args, layers=None)

    def advise(self, seen: SimpleNamespace) -> None:
        """Show what kdloss.suggest suggests for the method, and make it the defaults."""
        method = self.settings().method
        if method == "none":
            return
        advice = kdloss.suggest(seen.student, seen.setup.teacher, goal=GOALS[method])
        if advice == self.advice:
            return
        print(f"\n{advice}\n")
        self.advice, names = advice, ["temperature"]
        if advice.method == method:
            names += ["alpha", "layers", "pairing", "distance"]
        found = {name: value for name in names if (value := getattr(advice, name)) is not None}
        if callable(found.get("distance")):
            found["distance"] = found["distance"].__name__
        self.defaults = replace(DEFAULTS, method=advice.method, **found)

    def hold(self) -> tuple[Settings, SimpleNamespace]:
        """Ask for everything that has no flag until all checks pass; return the settings and the loaded models."""
        seen = SimpleNamespace()
        for names, check in GROUPS:
            refused = False
            if names[0] in ("method", "temperature"):  # before the question about the method, and after it
                self.advise(seen)
            while True:
                for name in names:
                    said = name in self.given
                    if self.asks and (refused or not said) and (said or matters(name, self.settings())):
                        self.ask(name)
                try:
                    if check is not None:
                        check(self.settings(), seen)
                    break
                except (ValueError, OSError) as reason:
                    if not self.asks:
                        raise
                    refused = True
                    questionary.print(str(reason), style="fg:ansired")
        return self.settings(), seen

    def ask(self, name: str) -> None:
        """Ask one question until the answer is valid for its flag."""
        self.forget(name)
        kind, default, before = get_args(TYPES[name])[0], getattr(self.defaults, name), self.answers.pop(name, "")
        asking = words(name, default)
        while True:
            if get_origin(kind) is Literal:
                asked = questionary.select(asking, list(get_args(kind)), before or default, style=STYLE)
            elif kind is bool:
                asked = questionary.confirm(asking, default)
            else:
                paths = PathCompleter() if name in PATHS else None
                asked = questionary.text(asking, before, completer=paths, complete_while_typing=False)
            before = self.answers[name] = asked.unsafe_ask()
            try:
                self.settings()
                return
            except SystemExit:  # tyro has printed the reason
                del self.answers[name]


def sizes(teacher: PreTrainedModel, student: PreTrainedModel) -> str:
    """A table of teacher and student."""
    rows = [["", "parameters", "blocks", "width", "smaller"]]
    for name, model in (("teacher", teacher), ("student", student)):
        config = model.config.get_text_config()
        shape = (config.num_hidden_layers, config.hidden_size)
        smaller = f"{teacher.num_parameters() / model.num_parameters():.2f}x"
        rows.append([name, f"{model.num_parameters():,}", *map(str, shape), smaller])
    return report.aligned(rows)


def results(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with one column per model, to fit a terminal."""
    rows = [["", *runs]]
    for heading, (key, form) in report.COLUMNS.items():
        if any(key in run for run in runs.values()):
            rows.append([heading, *(form.format(run[key]) if key in run else "" for run in runs.values())])
    return report.aligned(rows)


def run(args: distill_lm.Settings, setup: Setup, baseline: bool) -> dict[str, Any]:
    """Measure the student, train it, measure it again, and write the results."""
    teacher = distill_lm.teacher_measured(args, setup)

    def untrained(_: Path) -> dict[str, Any]:
        student = student_of(args, setup.teacher, setup.tokenizer)
        found = evaluation.evaluate(student, setup.tokenizer, setup.prompts, setup.reference, setup.judge)
        return found | {"perplexity": evaluation.perplexity(student, setup.heldout)}

    before = cells.cell(args.output / "cells", "before", distill_lm.settings_of(args, setup), untrained)
    rows = {"teacher": report.beside(teacher, teacher), "before": report.beside(before, teacher)}
    print(f"\n{results(rows)}\n")
    alone, students = None, args.output / "students"
    if baseline and args.method != "none":
        alone = distill_lm.measured(replace(args, method="none"), setup, students=students)
        rows["none"] = report.beside(alone, teacher)
    found = distill_lm.measured(args, setup, students=students)
    rows[args.method] = report.beside(found, teacher, alone) | {"before": before}
    print(f"\n{results(rows)}\n")
    runs = {name: [row] for name, row in rows.items() if name != "before"}
    report.write(runs, vars(args) | {"baseline": baseline}, args.output, distill_lm.NOTES)
    print(f"results: {args.output}/results.json, results.md, results.png")
    print(f'model:   AutoModelForCausalLM.from_pretrained("{found["student"]}")')
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Ask the questions, show the models, train the student, and print the results."""
    interview = Interview(sys.argv[1:] if arguments is None else arguments)
    answered = False
    try:
        args, seen = interview.hold()
        print(f"\n{sizes(seen.setup.teacher, seen.student)}\n")
        if interview.answers and not questionary.confirm("Train it?").unsafe_ask():
            raise KeyboardInterrupt
        answered = True
        print("This command repeats the run without questions, and resumes it if it was stopped:")
        print(f"\n  {interview.command(answered)}\n")
        setup = seen.setup if args.teacher is not None else prepare(args, distill_lm.train)
        del seen  # frees the models that were loaded for the checks
        return run(options.some(distill_lm.Settings, args), setup, args.baseline)
    except (KeyboardInterrupt, EOFError):
        print(f"\nStopped. To resume:\n\n  {interview.command(answered)}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as reason:
        sys.exit(f"\n{reason}")


if __name__ == "__main__":
    main()
