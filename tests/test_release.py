"""What a release needs: one version everywhere, and workflows that run the same checks as contributors."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import kdloss

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"

needs_the_repository = pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="workflows are only in the repository")


def jobs(name):
    return yaml.safe_load((WORKFLOWS / name).read_text())["jobs"]


def commands(job):
    return [step["run"].strip() for step in job["steps"] if "run" in step]


def test_the_version_is_the_same_in_package_citation_and_changelog():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    titles = re.compile(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", re.MULTILINE)
    newest = titles.search((ROOT / "CHANGELOG.md").read_text())
    assert (cited["version"], newest[1]) == (kdloss.__version__, kdloss.__version__)
    assert cited["license"] == "Apache-2.0"


@needs_the_repository
def test_a_change_and_a_release_both_run_the_complete_ci():
    assert commands(jobs("ci.yml")["check"]) == [".ci/run"]
    assert commands(jobs("publish.yml")["check"])[-1] == ".ci/run"


@needs_the_repository
def test_nothing_is_published_before_the_checks():
    needs = {name: job.get("needs") for name, job in jobs("publish.yml").items()}
    assert needs == {"check": None, "build": "check", "pypi": "build", "pages": "pypi"}


@needs_the_repository
@pytest.mark.parametrize(
    ("tag", "title", "accepted"),
    [
        ("v1.2.3", "## 1.2.3 (2027-01-02)", True),
        ("v1.2.4", "## 1.2.3 (2027-01-02)", False),
        ("v1.2.3", "## 1.2.3 (unreleased)", False),
        ("v1.2.3", "## 1.2.2 (2027-01-02)", False),
    ],
)
def test_a_tag_is_published_only_if_it_is_the_version_and_the_changelog_dates_it(tag, title, accepted, tmp_path):
    (tmp_path / "src" / "kdloss").mkdir(parents=True)
    (tmp_path / "src" / "kdloss" / "__init__.py").write_text('"""Losses."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{title}\n")
    command = commands(jobs("publish.yml")["check"])[0]
    # as GitHub runs it: any command that fails ends the step
    done = subprocess.run(
        ["bash", "-e", "-c", command], cwd=tmp_path, env={**os.environ, "GITHUB_REF_NAME": tag}, capture_output=True
    )
    assert (done.returncode == 0) is accepted


@needs_the_repository
def test_issue_templates_and_hooks_are_yaml_and_hooks_download_nothing():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()}
    assert set(forms) == {"bug", "question", "new_loss", "config"}
    assert all({"name", "description", "body"} <= set(form) for name, form in forms.items() if name != "config")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert {hook["entry"].split()[0] for hook in hooks[0]["hooks"]} == {".venv/bin/ruff"}
