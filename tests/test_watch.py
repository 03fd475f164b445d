"""What a loop forgot is said once, and nothing is left of the watching: no hook, no reference, no exception.

In order: when it warns; when it says nothing; what is left of it; left-over gradients; steps counted.
"""

import copy
import gc
import logging
import pickle
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import optimizer as torch_optimizer

from kdloss import _watch
from kdloss._watch import Steps, left_over, watch

LOG = logging.getLogger("kdloss")


def hooks():
    return len(torch_optimizer._global_optimizer_post_hooks)


@pytest.fixture(autouse=True)
def _as_many_hooks_as_before(monkeypatch):
    gc.collect()
    for listener in [*_watch._listeners]:  # of models that other tests of this process still hold
        listener.leave()
    monkeypatch.setattr(_watch, "_watched", weakref.WeakKeyDictionary())
    before = hooks()
    yield
    gc.collect()
    assert hooks() == before
    assert (_watch._listeners, _watch._handle) == ([], None)


@pytest.fixture
def pair():
    student, criterion = nn.Linear(3, 2), nn.ModuleDict({"projection": nn.Linear(2, 2)})
    return student, criterion


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "kdloss"]


def backward(*modules):
    for module in modules:
        sum(p.square().sum() for p in module.parameters() if p.requires_grad).backward()


def step(optimizer, *modules):
    optimizer.zero_grad()
    backward(*modules)
    optimizer.step()


# When it warns


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "AdamW": AdamW,
    "foreach": lambda p: AdamW(p, foreach=True),
    "fused": lambda p: AdamW(p, fused=True),
    "two groups": lambda p: AdamW([{"params": one} for one in p]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_without_the_criterions_parameters_is_told_once_with_the_line_to_write(make, pair, caplog):
    student, criterion = pair
    optimizer = make(student.parameters())
    watch(student, criterion, LOG)
    for _ in range(3):
        step(optimizer, student, criterion)
    (message,) = said(caplog)
    assert caplog.records[0].levelname == "WARNING"
    assert "projection.weight, projection.bias" in message
    assert "optimizer = AdamW([*student.parameters(), *criterion.parameters()])" in message
    assert "kdloss.Distillation" in message
    assert hooks() == 0


def test_lbfgs_is_told_whose_closure_is_where_the_watch_begins(pair, caplog):
    student, criterion = pair
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=3)

    def closure():
        watch(student, criterion, LOG)
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in student.parameters())
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(said(caplog)) == 1
    assert hooks() == 0


class Wrapper:
    """Any object around an optimizer, as of a scheduler or an accelerator."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_an_optimizer_inside_another_object_is_told(pair, caplog):
    student, criterion = pair
    optimizer = Wrapper(SGD(student.parameters(), lr=0.1))
    watch(student, criterion, LOG)
    step(optimizer, student)
    assert len(said(caplog)) == 1


def test_only_trained_parameters_are_named(pair, caplog):
    student, criterion = pair
    criterion["projection"].bias.requires_grad_(False)
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    (message,) = said(caplog)
    assert "which are not trained: projection.weight. Write" in message


def test_parameters_are_compared_as_they_are_at_the_step(pair, caplog):
    student, criterion = pair
    optimizer = SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    watch(student, criterion, LOG)
    criterion["projection"] = nn.Linear(2, 2)  # built after the optimizer
    step(optimizer, student)
    assert len(said(caplog)) == 1


def test_somebody_elses_optimizer_neither_warns_nor_ends_the_watch(pair, caplog):
    (student, criterion), other = pair, nn.Linear(2, 2)
    student.bias.requires_grad_(False)
    watch(student, criterion, LOG)
    step(SGD(other.parameters(), lr=0.1), other)
    step(SGD([*other.parameters(), student.bias], lr=0.1), other)  # not trained, so nothing of the student's
    assert said(caplog) == []
    assert hooks() == 1
    step(SGD(student.parameters(), lr=0.1), student)
    assert len(said(caplog)) == 1


def test_each_pair_is_told_for_itself(pair, caplog):
    student, criterion = pair
    other = nn.ModuleDict({"another": nn.Linear(2, 2)})
    watch(student, criterion, LOG)
    watch(student, other, LOG)
    assert hooks() == 1
    step(SGD(student.parameters(), lr=0.1), student)
    first, second = said(caplog)
    assert "projection.weight" in first
    assert "another.weight" in second


def test_the_same_pair_again_is_not_told_again(pair, caplog):
    student, criterion = pair
    optimizer = SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        watch(student, criterion, LOG)
        watch(student, criterion, LOG)
        assert len(_watch._listeners) <= 1
        step(optimizer, student)
    assert len(said(caplog)) == 1


# When it says nothing


def test_an_optimizer_with_both_ends_the_watch_silently(pair, caplog):
    student, criterion = pair
    watch(student, criterion, LOG)
    step(SGD([*student.parameters(), *criterion.parameters()], lr=0.1), student, criterion)
    assert hooks() == 0
    step(SGD(student.parameters(), lr=0.1), student)
    assert said(caplog) == []


@pytest.mark.parametrize("first", ["student", "criterion"])
def test_two_optimizers_with_one_each_are_fine_whichever_steps_first(first, pair, caplog):
    student, criterion = pair
    both = {"student": SGD(student.parameters(), lr=0.1), "criterion": AdamW(criterion.parameters())}
    watch(student, criterion, LOG)
    for optimizer in sorted(both, key=lambda name: name != first):
        step(both[optimizer], student, criterion)
    assert said(caplog) == []
    assert hooks() == 0


def test_one_optimizer_per_parameter_stepped_within_backward_is_fine(pair, caplog):
    student, criterion = pair
    watch(student, criterion, LOG)
    for p in [*student.parameters(), *criterion.parameters()]:
        optimizer = SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    backward(student, criterion)
    assert said(caplog) == []


def test_a_criterion_that_trains_nothing_is_fine(pair, caplog):
    student, criterion = pair
    criterion.requires_grad_(False)
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    assert said(caplog) == []
    assert hooks() == 0


class Odd:
    """An object that claims to be what it is not, or breaks when looked at."""

    @property
    def __class__(self):
        raise RuntimeError("looked at")


def test_objects_whose_attributes_raise_do_not_break_the_watch(pair, caplog):
    student, criterion = pair
    odd = [Odd(), weakref.proxy(student)]
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    assert len(said(caplog)) == 1
    assert len(odd) == 2


def test_nothing_is_raised_into_a_step(pair, caplog):
    class Broken(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            raise RuntimeError("broken")

    student, _ = pair
    optimizer, criterion = SGD(student.parameters(), lr=0.1), Broken(2, 2)
    watch(student, criterion, LOG)
    step(optimizer, student)
    assert said(caplog) == []
    assert hooks() == 0


class Plain(torch.optim.Optimizer):
    """One whose step has nothing that a graph could not hold."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad)


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_step_is_left_alone_and_the_next_eager_one_is_told(whole, pair, caplog):
    torch._dynamo.reset()
    student, criterion = pair
    optimizer, graphs = (Plain if whole else AdamW)(student.parameters()), []
    backward(student)
    watch(student, criterion, LOG)
    steps = Steps()
    steps.start()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(optimizer.step, backend=backend, fullgraph=whole)
    for _ in range(3):
        compiled()
    assert (len(graphs), steps.taken, said(caplog)) == (1, 0, [])
    steps.remove()
    torch._dynamo.reset()
    optimizer.step()
    assert len(said(caplog)) == 1


# What is left of it


@pytest.mark.parametrize("which", [0, 1])
def test_both_are_held_weakly_and_without_one_of_them_the_hook_is_gone(which, caplog):
    alive = [nn.Linear(3, 2), nn.Linear(2, 2)]
    watch(*alive, LOG)
    assert hooks() == 1
    dead = weakref.ref(alive[which])
    gc.disable()
    try:
        del alive[which]
        assert dead() is None
        assert hooks() == 0
    finally:
        gc.enable()
    assert said(caplog) == []


def test_nothing_holds_either_after_the_warning(caplog):
    student, criterion = nn.Linear(3, 2), nn.Linear(2, 2)
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    assert len(said(caplog)) == 1
    dead = [weakref.ref(student), weakref.ref(criterion)]
    del student, criterion
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    assert len(_watch._watched) == 0


@pytest.mark.parametrize("order", ["theirs first", "ours first", "ours between"])
def test_other_hooks_run_at_every_step_and_torch_does_not_trip_over_one_that_is_gone(order, pair, caplog):
    """Torch goes through its hooks as they are, and raises where one goes that isn't the last."""
    (student, criterion), ran, handles = pair, [], []

    def theirs():
        handles.append(torch_optimizer.register_optimizer_step_post_hook(lambda *_: ran.append(1)))

    if order != "ours first":
        theirs()
    watch(student, criterion, LOG)
    if order != "theirs first":
        theirs()
    optimizer, count = SGD(student.parameters(), lr=0.1), len(handles)
    for _ in range(3):
        step(optimizer, student)
    assert len(ran) == 3 * count
    assert len(said(caplog)) == 1
    assert hooks() == count + (order != "theirs first"), "where it can't go it does nothing"
    handles.pop().remove()
    step(optimizer, student)
    assert hooks() == count - 1
    [handle.remove() for handle in handles]


def test_a_student_freed_within_somebody_elses_hook_does_not_break_the_step(caplog):
    alive, ran = [nn.Linear(3, 2)], []
    criterion, other = nn.Linear(2, 2), nn.Linear(2, 2)
    handle = torch_optimizer.register_optimizer_step_post_hook(lambda *_: ran.append(alive.clear()))
    watch(alive[0], criterion, LOG)
    optimizer = SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        step(optimizer, other)
    assert (len(ran), hooks(), said(caplog)) == (2, 1, [])
    handle.remove()


def test_a_process_that_ends_while_it_watches_prints_nothing():
    code = """
        import logging
        from torch import nn
        from kdloss._watch import Steps, watch
        student, criterion, steps = nn.Linear(3, 2), nn.Linear(2, 2), Steps()
        watch(student, criterion, logging.getLogger())
        steps.start()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout + done.stderr == ""


# Left-over gradients


def test_gradients_left_over_are_those_of_a_criterion_beside_a_student_without_any(pair):
    student, criterion = pair
    assert not left_over(student, criterion)
    backward(student, criterion)
    assert not left_over(student, criterion)
    student.zero_grad()
    assert left_over(student, criterion)
    criterion.zero_grad()
    assert not left_over(student, criterion)
    backward(student)
    assert not left_over(student, criterion)


def test_one_gradient_of_the_students_is_enough_for_accumulation(pair):
    student, criterion = pair
    backward(student, criterion)
    student.weight.grad = None
    assert not left_over(student, criterion)


def test_gradients_of_what_is_not_trained_do_not_count(pair):
    student, criterion = pair
    backward(student, criterion)
    student.zero_grad()
    criterion.requires_grad_(False)
    assert not left_over(student, criterion)
    criterion.requires_grad_(True)
    backward(student)
    student.requires_grad_(False)
    assert left_over(student, criterion)


def test_gradients_set_to_zeros_tell_nothing(pair):
    student, criterion = pair
    backward(student, criterion)
    student.zero_grad(set_to_none=False)
    assert not left_over(student, criterion)


# Steps counted


def test_steps_of_any_optimizer_count_from_the_start_to_the_removal(pair):
    student, criterion = pair
    optimizers, steps = [SGD(student.parameters(), lr=0.1), AdamW(criterion.parameters())], Steps()
    step(optimizers[0], student)
    assert (steps.taken, hooks()) == (0, 0)
    steps.start()
    steps.start()
    for optimizer in optimizers * 2:
        step(optimizer, student, criterion)
    assert (steps.taken, hooks()) == (4, 1)
    steps.remove()
    steps.remove()
    step(optimizers[0], student)
    assert (steps.taken, hooks()) == (4, 0)
    steps.start()
    step(optimizers[0], student)
    assert steps.taken == 5
    steps.remove()


def test_a_counter_is_held_weakly(pair):
    steps = Steps()
    steps.start()
    assert hooks() == 1
    gc.disable()
    try:
        del steps
        assert hooks() == 0
    finally:
        gc.enable()


def test_counters_and_watches_share_one_hook_and_end_independently(pair, caplog):
    student, criterion = pair
    first, second, optimizer = Steps(), Steps(), SGD(student.parameters(), lr=0.1)
    first.start()
    watch(student, criterion, LOG)
    second.start()
    assert hooks() == 1
    step(optimizer, student)
    first.remove()
    step(optimizer, student)
    assert (first.taken, second.taken, len(said(caplog))) == (1, 2, 1)
    second.remove()


def test_copies_of_a_counter_begin_at_zero_and_not_started(pair):
    student, _ = pair
    steps, optimizer = Steps(), SGD(student.parameters(), lr=0.1)
    steps.start()
    step(optimizer, student)
    twins = [copy.copy(steps), copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))]
    step(optimizer, student)
    assert (steps.taken, [twin.taken for twin in twins]) == (2, [0, 0, 0])
    steps.remove()
