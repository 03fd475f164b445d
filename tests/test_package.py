"""The contents of the repository, the sdist and the wheel: only our files, small and complete."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest

import kdloss

ROOT = Path(__file__).parent.parent

# For each folder: the suffixes that files may have, with the maximum size of a file in kB.
ALLOWED = {
    "src": {".py": 40, ".typed": 0},
    "tests": {".py": 80},
    "examples": {".py": 10, ".md": 10},
    "applications": {".py": 20, ".yaml": 2},
    "benchmarks": {".py": 20},
    "nightly": {".py": 20},
    "docs": {".md": 60, ".png": 200, ".svg": 10, ".py": 5, ".js": 3, ".css": 1, ".ipynb": 10},
    ".ci": {"": 2},
    ".github": {".yml": 5, ".md": 2},
}
TOP = {
    ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "README.md", "SECURITY.md", "constraints.txt", "constraints-oldest.txt", "mkdocs.yml", "pyproject.toml",
}  # fmt: skip
SHIPPED = {"src", "tests", "examples", "applications", "benchmarks", "nightly", "docs"} | TOP


class Built(NamedTuple):
    """The names of the files in both archives, the metadata of the wheel, and the README in the metadata."""

    sdist: set[str]
    wheel: set[str]
    metadata: Message
    readme: str


@pytest.fixture(scope="module")
def tracked():
    """The files that git tracks, and new files that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("there is no git repository here")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The archives of `python -m build`, which builds the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(archive.read(metadata))
        return Built(inside, set(archive.namelist()), about, about.get_payload(decode=True).decode())


def test_git_tracks_only_source_pages_and_pictures_and_no_large_file(tracked):
    wrong = []
    for name in sorted(tracked):
        path = Path(name)
        allowed = ALLOWED.get(path.parts[0], {}) if len(path.parts) > 1 else dict.fromkeys([path.suffix], 100)
        kilobytes = (ROOT / name).stat().st_size / 1000
        listed = len(path.parts) > 1 or name in TOP
        if not listed or path.suffix not in allowed or kilobytes > allowed[path.suffix]:
            wrong.append(f"{name} ({kilobytes:.0f} kB)")
    assert wrong == []


def test_the_sdist_contains_the_files_in_git_and_its_metadata(built, tracked):
    assert built.sdist == {name for name in tracked if name.split("/")[0] in SHIPPED} | {"PKG-INFO"}


def test_the_wheel_contains_only_the_library_and_its_metadata(built):
    ours = {
        str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.suffix in {".py", ".typed"}
    }
    about = {
        f"kdloss-{kdloss.__version__}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    }
    assert "kdloss/py.typed" in ours
    assert built.wheel == ours | about


def test_the_wheel_has_the_version_of_the_module_and_the_changelog_lists_it(built):
    assert built.metadata["Version"] == kdloss.__version__
    assert f"## {kdloss.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_metadata_name_author_licence_requirements_and_python_versions(built):
    about = built.metadata
    assert about["Author"] in (ROOT / "LICENSE").read_text()
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"
    plain = {re.match(r"[\w-]+", x)[0] for x in about.get_all("Requires-Dist") if "extra ==" not in x}
    assert plain == {"torch", "einops", "jaxtyping"}
    classifiers = about.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers
    assert about["Keywords"]


def test_the_readme_on_pypi_has_only_absolute_links(built):
    targets = re.findall(r"\]\(([^)\s]*)\)", built.readme)
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "--8<--" not in built.readme


def test_the_readme_on_pypi_has_the_same_text_and_code(built):
    def plain(text):
        return re.sub(r"\W+", " ", re.sub(r"!\[.*?\]\(.*?\)|<!--.*?-->|\]\(.*?\)", " ", text)).strip()

    readme = (ROOT / "README.md").read_text()
    assert plain(built.readme) == plain(readme)
    code = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    assert code.findall(built.readme) == code.findall(readme)
