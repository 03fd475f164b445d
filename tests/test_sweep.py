"""Every class of transformers' mappings: right or refused, and as docs/models.md says."""

import pytest
from sweep import BEGIN, END, PAGE, classes, stated, table, verdict

STATED = stated()


@pytest.mark.filterwarnings("ignore")  # transformers' own, of configurations that nobody uses
@pytest.mark.parametrize(("kind", "model_type", "name"), [row[1:] for row in classes()], ids=lambda x: x)
def test_a_class_is_right_or_refused_or_can_not_be_run_and_the_page_says_so(kind, model_type, name):
    what, why = verdict(kind, model_type, name)
    assert what == STATED.get(name, ("not on the page",))[0], why


def test_the_page_has_every_class_once_in_the_form_that_the_sweep_writes():
    found = {}
    for mapping, _, _, name in classes():
        found.setdefault(mapping, []).append((name, *STATED[name]))
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip() == table(found).strip()
