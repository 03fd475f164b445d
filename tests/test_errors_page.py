"""Every message on docs/errors.md is a message of the library, which the mistakes of `provoked.py` cause."""

import inspect
import logging
import re

import provoked
import pytest
import readme
from versions import since_torch

PAGE = (readme.ROOT / "docs" / "errors.md").read_text()
HEADINGS = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
NEWER = "was compiled as a whole", "has no criterion.safetensors", "takes no position_ids"
MARKS = {words: [since_torch(2, 6)] for words in NEWER}
CASES = [pytest.param(words, marks=MARKS.get(words, [])) for words in provoked.CASES]


def heading(words):
    matches = [line for line in HEADINGS if words in line]
    assert len(matches) == 1, f"{words!r} stands in {matches}"
    return matches[0]


def test_every_message_on_the_page_is_provoked():
    assert sorted(map(heading, provoked.CASES)) == sorted(HEADINGS)


@pytest.mark.filterwarnings("ignore:.*loss_type=None.*")
@pytest.mark.parametrize("words", CASES)
def test_a_provoked_message_matches_its_heading(words, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO, logger="kdloss")
    provoke = provoked.CASES[words]
    arguments = {"folder": str(tmp_path), "monkeypatch": monkeypatch}
    messages = []
    try:
        provoke(*(arguments[name] for name in inspect.signature(provoke).parameters))
    except Exception as error:
        messages.append(str(error))
    messages += [record.getMessage() for record in caplog.records]
    pattern = ".*".join(re.escape(part) for part in heading(words).removesuffix("…").split("…"))
    assert any(re.match(pattern, one, re.DOTALL) for one in messages), messages
