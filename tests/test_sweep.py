"""Every class in transformers' mappings works or is refused, as docs/models.md says."""

import pytest
from sweep import BEGIN, END, PAGE, classes, stated, table, verdict

STATED = stated()


@pytest.mark.filterwarnings("ignore")  # raised by transformers for unusual configurations
@pytest.mark.parametrize(("kind", "model_type", "name"), [row[1:] for row in classes()], ids=lambda x: x)
def test_the_page_says_whether_a_class_works_is_refused_or_cannot_run(kind, model_type, name):
    what, why = verdict(kind, model_type, name)
    assert what == STATED.get(name, ("not on the page",))[0], why


def test_the_page_has_the_table_that_the_sweep_writes():
    found = {}
    for mapping, _, _, name in classes():
        found.setdefault(mapping, []).append((name, *STATED[name]))
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip() == table(found).strip()
