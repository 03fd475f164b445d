"""Every class of transformers' mappings: right or refused, and as docs/models.md says."""

import pytest
from sweep import classes, stated, verdict

STATED = stated()


@pytest.mark.filterwarnings("ignore")  # transformers' own, of configurations that nobody uses
@pytest.mark.parametrize(("kind", "model_type", "name"), [row[1:] for row in classes()], ids=lambda x: x)
def test_a_class_is_right_or_refused_or_can_not_be_run_and_the_page_says_so(kind, model_type, name):
    what, why = verdict(kind, model_type, name)
    assert what == STATED.get(name), why
