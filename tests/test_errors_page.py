"""Every message on docs/errors.md is one that the library gives, when a user does what the page is about."""

import inspect
import logging
import re

import provoked
import pytest
import readme
from versions import since_torch

PAGE = (readme.ROOT / "docs" / "errors.md").read_text()
HEADINGS = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
LATER = {"was compiled as a whole": [since_torch(2, 6)], "has no criterion.safetensors": [since_torch(2, 6)]}
CASES = [pytest.param(words, marks=LATER.get(words, [])) for words in provoked.CASES]


def heading(words):
    found = [line for line in HEADINGS if words in line]
    assert len(found) == 1, f"{words!r} stands in {found}"
    return found[0]


def test_every_message_on_the_page_is_provoked_here():
    assert sorted(map(heading, provoked.CASES)) == sorted(HEADINGS)


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.parametrize("words", CASES)
def test_a_message_reads_as_its_heading_says(words, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO, logger="kdloss")
    do = provoked.CASES[words]
    given = {"folder": str(tmp_path), "monkeypatch": monkeypatch}
    told = []
    try:
        do(*(given[name] for name in inspect.signature(do).parameters))
    except Exception as error:
        told.append(str(error))
    told += [record.getMessage() for record in caplog.records]
    pattern = ".*".join(re.escape(part) for part in heading(words).removesuffix("…").split("…"))
    assert any(re.match(pattern, one, re.DOTALL) for one in told), told
