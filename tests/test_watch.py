"""`watch` warns once about what a training loop forgot, and leaves no hook, no reference and no exception behind.

In this order: when it warns, when it does not, what remains after it, left-over gradients, the counter of steps.
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
    for listener in [*_watch._listeners]:  # of models that other tests in this process still reference
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


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "kdloss"]


def backward(*modules):
    for module in modules:
        sum(p.square().sum() for p in module.parameters() if p.requires_grad).backward()


def step(optimizer, *modules):
    optimizer.zero_grad()
    backward(*modules)
    optimizer.step()


# -- when it warns --


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "AdamW": AdamW,
    "foreach": lambda p: AdamW(p, foreach=True),
    "fused": lambda p: AdamW(p, fused=True),
    "two groups": lambda p: AdamW([{"params": one} for one in p]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_without_the_criterions_parameters_causes_one_warning_with_the_code_to_write(make, pair, caplog):
    student, criterion = pair
    optimizer = make(student.parameters())
    watch(student, criterion, LOG)
    for _ in range(3):
        step(optimizer, student, criterion)
    (message,) = logged(caplog)
    assert caplog.records[0].levelname == "WARNING"
    assert "projection.weight, projection.bias" in message
    assert "optimizer = AdamW([*student.parameters(), *criterion.parameters()])" in message
    assert "kdloss.Distillation" in message
    assert hooks() == 0


def test_a_watch_that_starts_inside_the_closure_of_lbfgs_warns_once(pair, caplog):
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
    assert len(logged(caplog)) == 1
    assert hooks() == 0


class Wrapper:
    """An object around an optimizer, like those of schedulers and of accelerate."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_an_optimizer_inside_a_wrapper_causes_a_warning(pair, caplog):
    student, criterion = pair
    optimizer = Wrapper(SGD(student.parameters(), lr=0.1))
    watch(student, criterion, LOG)
    step(optimizer, student)
    assert len(logged(caplog)) == 1


def test_the_warning_names_only_trainable_parameters(pair, caplog):
    student, criterion = pair
    criterion["projection"].bias.requires_grad_(False)
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    (message,) = logged(caplog)
    assert "which are not trained: projection.weight. Write" in message


def test_parameters_are_compared_at_the_step_and_not_when_the_watch_starts(pair, caplog):
    student, criterion = pair
    optimizer = SGD([*student.parameters(), *criterion.parameters()], lr=0.1)
    watch(student, criterion, LOG)
    criterion["projection"] = nn.Linear(2, 2)  # built after the optimizer
    step(optimizer, student)
    assert len(logged(caplog)) == 1


def test_an_optimizer_of_another_model_neither_warns_nor_ends_the_watch(pair, caplog):
    (student, criterion), other = pair, nn.Linear(2, 2)
    student.bias.requires_grad_(False)
    watch(student, criterion, LOG)
    step(SGD(other.parameters(), lr=0.1), other)
    step(SGD([*other.parameters(), student.bias], lr=0.1), other)  # has only a frozen parameter of the student
    assert logged(caplog) == []
    assert hooks() == 1
    step(SGD(student.parameters(), lr=0.1), student)
    assert len(logged(caplog)) == 1


def test_each_pair_of_student_and_criterion_causes_its_own_warning(pair, caplog):
    student, criterion = pair
    other = nn.ModuleDict({"another": nn.Linear(2, 2)})
    watch(student, criterion, LOG)
    watch(student, other, LOG)
    assert hooks() == 1
    step(SGD(student.parameters(), lr=0.1), student)
    first, second = logged(caplog)
    assert "projection.weight" in first
    assert "another.weight" in second


def test_watching_the_same_pair_again_causes_no_second_warning(pair, caplog):
    student, criterion = pair
    optimizer = SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        watch(student, criterion, LOG)
        watch(student, criterion, LOG)
        assert len(_watch._listeners) <= 1
        step(optimizer, student)
    assert len(logged(caplog)) == 1


# -- when it does not warn --


def test_an_optimizer_with_both_parameter_sets_ends_the_watch_without_a_warning(pair, caplog):
    student, criterion = pair
    watch(student, criterion, LOG)
    step(SGD([*student.parameters(), *criterion.parameters()], lr=0.1), student, criterion)
    assert hooks() == 0
    step(SGD(student.parameters(), lr=0.1), student)
    assert logged(caplog) == []


@pytest.mark.parametrize("first", ["student", "criterion"])
def test_one_optimizer_for_each_module_causes_no_warning_in_either_order(first, pair, caplog):
    student, criterion = pair
    both = {"student": SGD(student.parameters(), lr=0.1), "criterion": AdamW(criterion.parameters())}
    watch(student, criterion, LOG)
    for optimizer in sorted(both, key=lambda name: name != first):
        step(both[optimizer], student, criterion)
    assert logged(caplog) == []
    assert hooks() == 0


def test_one_optimizer_per_parameter_stepped_within_backward_causes_no_warning(pair, caplog):
    student, criterion = pair
    watch(student, criterion, LOG)
    for p in [*student.parameters(), *criterion.parameters()]:
        optimizer = SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    backward(student, criterion)
    assert logged(caplog) == []


def test_a_criterion_without_trainable_parameters_causes_no_warning(pair, caplog):
    student, criterion = pair
    criterion.requires_grad_(False)
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    assert logged(caplog) == []
    assert hooks() == 0


class Odd:
    """An object that raises an error when its class is read."""

    @property
    def __class__(self):
        raise RuntimeError("looked at")


def test_objects_whose_attributes_raise_errors_do_not_break_the_watch(pair, caplog):
    student, criterion = pair
    odd = [Odd(), weakref.proxy(student)]
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    assert len(logged(caplog)) == 1
    assert len(odd) == 2


def test_an_error_inside_the_watch_is_not_raised_in_the_step(pair, caplog):
    class Broken(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            raise RuntimeError("broken")

    student, _ = pair
    optimizer, criterion = SGD(student.parameters(), lr=0.1), Broken(2, 2)
    watch(student, criterion, LOG)
    step(optimizer, student)
    assert logged(caplog) == []
    assert hooks() == 0


class Plain(torch.optim.Optimizer):
    """An optimizer whose step compiles to one graph."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_step_is_not_counted_and_the_next_eager_step_causes_the_warning(fullgraph, pair, caplog):
    torch._dynamo.reset()
    student, criterion = pair
    optimizer, graphs = (Plain if fullgraph else AdamW)(student.parameters()), []
    backward(student)
    watch(student, criterion, LOG)
    steps = Steps()
    steps.start()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(optimizer.step, backend=backend, fullgraph=fullgraph)
    for _ in range(3):
        compiled()
    assert (len(graphs), steps.taken, logged(caplog)) == (1, 0, [])
    steps.remove()
    torch._dynamo.reset()
    optimizer.step()
    assert len(logged(caplog)) == 1


# -- what remains after it --


@pytest.mark.parametrize("which", [0, 1])
def test_student_and_criterion_are_held_weakly_and_the_hook_is_removed_with_either(which, caplog):
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
    assert logged(caplog) == []


def test_student_and_criterion_are_freed_after_the_warning(caplog):
    student, criterion = nn.Linear(3, 2), nn.Linear(2, 2)
    watch(student, criterion, LOG)
    step(SGD(student.parameters(), lr=0.1), student)
    assert len(logged(caplog)) == 1
    dead = [weakref.ref(student), weakref.ref(criterion)]
    del student, criterion
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    assert len(_watch._watched) == 0


@pytest.mark.parametrize("order", ["theirs first", "ours first", "ours between"])
def test_other_hooks_run_at_every_step_wherever_the_watch_registers_its_own_among_them(order, pair, caplog):
    """Torch iterates over its hooks, and raises an error if one that is not the last removes itself meanwhile."""
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
    assert len(logged(caplog)) == 1
    assert hooks() == count + (order != "theirs first"), "a hook that cannot be removed stays and does nothing"
    handles.pop().remove()
    step(optimizer, student)
    assert hooks() == count - 1
    [handle.remove() for handle in handles]


def test_a_student_freed_within_another_hook_does_not_break_the_step(caplog):
    alive, ran = [nn.Linear(3, 2)], []
    criterion, other = nn.Linear(2, 2), nn.Linear(2, 2)
    handle = torch_optimizer.register_optimizer_step_post_hook(lambda *_: ran.append(alive.clear()))
    watch(alive[0], criterion, LOG)
    optimizer = SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        step(optimizer, other)
    assert (len(ran), hooks(), logged(caplog)) == (2, 1, [])
    handle.remove()


def test_a_process_that_exits_during_a_watch_prints_nothing():
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


# -- left-over gradients --


def test_gradients_are_left_over_if_the_criterion_has_some_and_the_student_has_none(pair):
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


def test_one_gradient_of_the_student_means_that_gradients_accumulate(pair):
    student, criterion = pair
    backward(student, criterion)
    student.weight.grad = None
    assert not left_over(student, criterion)


def test_gradients_of_frozen_parameters_do_not_count(pair):
    student, criterion = pair
    backward(student, criterion)
    student.zero_grad()
    criterion.requires_grad_(False)
    assert not left_over(student, criterion)
    criterion.requires_grad_(True)
    backward(student)
    student.requires_grad_(False)
    assert left_over(student, criterion)


def test_gradients_set_to_zeros_are_not_reported_as_left_over(pair):
    student, criterion = pair
    backward(student, criterion)
    student.zero_grad(set_to_none=False)
    assert not left_over(student, criterion)


# -- the counter of steps --


def test_steps_of_every_optimizer_are_counted_between_start_and_remove(pair):
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


def test_counters_and_watches_share_one_hook_and_stop_independently(pair, caplog):
    student, criterion = pair
    first, second, optimizer = Steps(), Steps(), SGD(student.parameters(), lr=0.1)
    first.start()
    watch(student, criterion, LOG)
    second.start()
    assert hooks() == 1
    step(optimizer, student)
    first.remove()
    step(optimizer, student)
    assert (first.taken, second.taken, len(logged(caplog))) == (1, 2, 1)
    second.remove()


def test_a_copy_of_a_counter_is_at_zero_and_not_started(pair):
    student, _ = pair
    steps, optimizer = Steps(), SGD(student.parameters(), lr=0.1)
    steps.start()
    step(optimizer, student)
    twins = [copy.copy(steps), copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))]
    step(optimizer, student)
    assert (steps.taken, [twin.taken for twin in twins]) == (2, [0, 0, 0])
    steps.remove()
