"""Distil a language model by answering questions.

    python applications/cli.py                                            # asks for everything
    python applications/cli.py --teacher my/teacher --data texts.jsonl    # asks for the rest
    python applications/cli.py --yes                                      # asks nothing

Every question is a flag, most of them those of distill_lm.py, whose functions do the work. An empty
answer takes the flag's default. Killed at any instant, the same command and answers go on.
"""

import argparse
import io
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_lm
import questionary
from parts import cells, evaluation, models, options, report, text
from parts.setup import Setup, prepare, student_of
from prompt_toolkit.completion import PathCompleter
from torch.optim import AdamW
from transformers import PreTrainedModel

import kdloss
from kdloss.layers.select import STRATEGIES


def parser() -> argparse.ArgumentParser:
    """The flags of distill_lm.py, and two more."""
    made = distill_lm.parser(__doc__)
    made.set_defaults(output=Path("runs/cli"), samples=6000)
    made._option_string_actions["--samples"].help = "use so many texts (%(default)s)"
    add = made.add_argument_group("questions").add_argument
    add("--yes", action="store_true", help="ask nothing: what no flag says has its default")
    alone = "also train the student without a teacher"
    add("--baseline", action=argparse.BooleanOptionalAction, default=True, help=alone)
    return made


def readable(args: argparse.Namespace, seen: SimpleNamespace) -> None:
    """Raises unless the text can be read."""
    source = {"config": args.data_config, "split": args.split, "column": args.text_column}
    text.read_texts(args.data, **source, limit=args.samples)


def loadable(args: argparse.Namespace, seen: SimpleNamespace) -> None:
    """Raises unless the teacher can be loaded, if there is one to load."""
    if args.teacher is not None:
        models.load(args.teacher)


def teachable(args: argparse.Namespace, seen: SimpleNamespace) -> None:
    """Raises unless the teacher reads the text; one that is to be trained stands there untrained."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        rehearsal = argparse.Namespace(**vars(args) | {"teachers": Path(folder)})
        seen.setup = prepare(rehearsal, train=lambda *_, **__: None)


def makeable(args: argparse.Namespace, seen: SimpleNamespace) -> None:
    """Raises unless the student can be made and has the teacher's vocabulary."""
    seen.student = student_of(args, seen.setup.teacher, seen.setup.tokenizer)


def mixable(args: argparse.Namespace, seen: SimpleNamespace) -> None:
    """Raises unless the loss takes temperature and alpha."""
    distill_lm.criterion_for(argparse.Namespace(**vars(args) | {"method": "vanilla"}))


def distillable(args: argparse.Namespace, seen: SimpleNamespace) -> None:
    """Raises unless the loss finds its layers in both models."""
    kdloss.Distiller(seen.setup.teacher, distill_lm.criterion_for(args)).prepare(seen.student)


def trainable(args: argparse.Namespace, seen: SimpleNamespace) -> None:
    """Raises unless the optimizer takes its settings."""
    AdamW(seen.student.parameters(), lr=args.lr)


GROUPS = [  # what belongs together, and has to pass together before the next questions
    (["method"], None),
    (["data", "data_config", "split"], readable),
    (["teacher"], loadable),
    (["samples", "heldout_samples", "max_length"], teachable),
    (["student"], makeable),
    (["temperature", "alpha"], mixable),
    (["layers", "pairing", "distance"], distillable),
    (["epochs", "batch_size"], None),
    (["lr"], trainable),
    (["baseline"], None),
]
STYLE = questionary.Style([("selected", "noreverse"), ("highlighted", "bold")])  # the arrow marks one line


def matters(name: str, args: argparse.Namespace) -> bool:
    """Whether the other answers leave a question open."""
    try:
        dataset = args.data is not None and text.kind_of(args.data) is None
    except ValueError:  # no text at all, which is said when the questions about it are answered
        dataset = False
    open_by_name = {
        "data_config": dataset,
        "split": dataset,
        "epochs": args.steps is None,
        "baseline": args.method != "none",
    }
    return open_by_name.get(name, name not in distill_lm.UNUSED[args.method])


def flag(action: argparse.Action, answer: str | bool) -> list[str]:
    """An answer as it stands on the command line."""
    if answer == "":
        return []
    if isinstance(answer, bool):
        return [action.option_strings[0 if answer else 1]]
    blocks = options.blocks_or_names(answer)
    if action.dest == "student" and (answer in STRATEGIES or isinstance(blocks[0], int)):
        return [f"--keep-blocks={answer}"]
    return [f"{action.option_strings[0]}={answer}"]


class Interview:
    """The flags that were given, and answers that become flags: both are read and checked alike."""

    def __init__(self, made: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        self.parser, self.arguments = made, list(arguments)
        self.actions = {action.dest: action for action in made._actions}  # there is no public way
        nothing = argparse.Namespace(**dict.fromkeys(vars(made.parse_args([]))))
        given = made.parse_args(self.arguments, nothing)
        self.given = {name for name, value in vars(given).items() if value is not None}
        self.given |= {"student"} if given.keep_blocks is not None else set()  # two flags, one question
        self.asks = sys.stdin.isatty() and not given.yes
        self.answers: dict[str, Any] = {}
        made.exit_on_error = False  # from now on the reason is shown and the question asked again

    def command(self, whole: bool) -> str:
        """What makes the same run again, without any questions if they were all answered."""
        yes = ["--yes"] if whole and "--yes" not in self.arguments else []
        return shlex.join(["python", sys.argv[0], *yes, *self.flags()])

    def flags(self) -> list[str]:
        """As if everything had been said on the command line."""
        answered = [flag(self.actions[name], answer) for name, answer in self.answers.items()]
        return [*self.arguments, *(part for parts in answered for part in parts)]

    def settings(self) -> argparse.Namespace:
        """What was said so far, defaults for the rest."""
        return self.parser.parse_args(self.flags())

    def hold(self) -> tuple[argparse.Namespace, SimpleNamespace]:
        """Ask for what no flag said, until it passes; returns it with the models that passed."""
        seen = SimpleNamespace()
        for names, check in GROUPS:
            refused = False
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
                    refuse(reason)
        return self.settings(), seen

    def ask(self, name: str) -> None:
        """Ask one question until the parser takes the answer."""
        action, before = self.actions[name], self.answers.pop(name, "")
        words = f"{name.replace('_', ' ')}: {action.help % vars(action)}"
        if name == "student":
            words += f"; or {self.actions['keep_blocks'].help}"
        words = textwrap.fill(words, shutil.get_terminal_size().columns - 24, subsequent_indent="  ")
        while True:
            if action.choices:
                question = questionary.select(words, list(action.choices), before or action.default, style=STYLE)
            elif isinstance(action.default, bool):
                question = questionary.confirm(words, action.default)
            else:
                paths = PathCompleter() if action.type is None else None
                question = questionary.text(words, before, completer=paths, complete_while_typing=False)
            before = self.answers[name] = question.unsafe_ask()
            try:
                self.settings()
                return
            except argparse.ArgumentError as reason:
                refuse(reason)
                del self.answers[name]


def refuse(reason: Exception) -> None:
    """Say why an answer won't do."""
    questionary.print(str(reason), style="fg:ansired")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table for the screen."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def sizes(teacher: PreTrainedModel, student: PreTrainedModel) -> str:
    """Teacher and student beside each other."""
    rows = [["", "parameters", "blocks", "width", "smaller"]]
    for name, model in (("teacher", teacher), ("student", student)):
        config = model.config.get_text_config()
        shape = (config.num_hidden_layers, config.hidden_size)
        smaller = f"{teacher.num_parameters() / model.num_parameters():.2f}x"
        rows.append([name, f"{model.num_parameters():,}", *map(str, shape), smaller])
    return aligned(rows)


def results(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """One column per model, so that it fits a terminal."""
    rows = [["", *runs]]
    for heading, (key, form) in report.COLUMNS.items():
        if any(key in run for run in runs.values()):
            rows.append([heading, *(form.format(run[key]) if key in run else "" for run in runs.values())])
    return aligned(rows)


def run(args: argparse.Namespace, setup: Setup, baseline: bool) -> dict[str, Any]:
    """Measure before, train, measure after, and write everything down."""
    teacher = distill_lm.teacher_measured(args, setup)

    def untrained(_: Path) -> dict[str, Any]:
        student = student_of(args, setup.teacher, setup.tokenizer)
        found = evaluation.evaluate(student, setup.tokenizer, setup.prompts, setup.reference)
        return found | {"perplexity": evaluation.perplexity(student, setup.heldout)}

    before = cells.cell(args.output / "cells", "before", distill_lm.settings_of(args, setup), untrained)
    rows = {"teacher": report.beside(teacher, teacher), "before": report.beside(before, teacher)}
    print(f"\n{results(rows)}\n")
    alone, students = None, args.output / "students"
    if baseline and args.method != "none":
        alone = distill_lm.measured(argparse.Namespace(**vars(args) | {"method": "none"}), setup, students=students)
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
    """Ask, show what is going to be trained, train it, and say what came of it."""
    interview = Interview(parser(), sys.argv[1:] if arguments is None else arguments)
    answered = False
    try:
        args, seen = interview.hold()
        print(f"\n{sizes(seen.setup.teacher, seen.student)}\n")
        if interview.answers and not questionary.confirm("Train it?").unsafe_ask():
            raise KeyboardInterrupt
        answered = True
        print("The same run without questions; it goes on if it is stopped:")
        print(f"\n  {interview.command(answered)}\n")
        vars(args).pop("yes")
        setup = seen.setup if args.teacher is not None else prepare(args, distill_lm.train)
        del seen  # models that were loaded to look at them
        return run(args, setup, vars(args).pop("baseline"))
    except (KeyboardInterrupt, EOFError):
        print(f"\nStopped. This goes on:\n\n  {interview.command(answered)}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as reason:
        sys.exit(f"\n{reason}")


if __name__ == "__main__":
    main()
