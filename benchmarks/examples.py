"""Run every example in full, and save its output and its picture for the docs.

python benchmarks/examples.py [name ...]
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "docs" / "results" / "examples"


def behind_bars(text: str) -> str:
    """The text after the last progress bar that a framework wrote to stdout."""
    lines = text.splitlines()
    start = max((number for number, line in enumerate(lines, start=1) if "it/s" in line), default=0)
    return "\n".join(lines[start:]).strip() + "\n"


def page(said: str) -> str:
    """The output as Markdown: a Trainer's log as a block of text, then the tables unchanged."""
    log = [line for line in said.splitlines() if line.startswith("{")]
    rest = [line for line in said.splitlines() if not line.startswith("{")]
    return "\n".join([*(["```text", *log, "```", ""] if log else []), *rest]) + "\n"


def main() -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "examples").glob("*.py")):
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        print(f"--- {path.name}", flush=True)
        start = time.time()
        ran = subprocess.run([sys.executable, path], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        said = behind_bars(ran.stdout)
        (KEPT / f"{path.stem}.md").write_text(page(said), encoding="utf-8")
        picture = ROOT / "runs" / f"{path.stem}.png"
        if picture.exists() and picture.stat().st_mtime >= start:
            shutil.copy(picture, KEPT)
        print(f"{said}{time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
