"""Put MathJax beside the pages, from where `make docs` unpacks its npm package."""

import shutil
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent.parent / ".venv" / "mathjax"


def on_post_build(config: Any) -> None:
    """Copy its files into the site that was built."""
    if FILES.is_dir():
        shutil.copytree(FILES, Path(config.site_dir) / "mathjax", dirs_exist_ok=True)
