"""Hooks that live inside a `with`, record one pass, and refuse to record nothing."""

import copy
import pickle
import threading
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdloss


class Net(nn.Module):
    """Three blocks, with switches for what real models do."""

    def __init__(self, twice=False, skip=False, checkpointing=None, wrap=lambda x: x):
        super().__init__()
        self.blocks = nn.ModuleList(Block(wrap) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.twice, self.skip, self.checkpointing = twice, skip, checkpointing

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if self.skip and i == 1:
                continue
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            x = x if isinstance(x, torch.Tensor) else next(iter(getattr(x, "values", lambda x=x: x)()))
        return self.head(self.blocks[2](x) if self.twice else x)


class Block(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap, self.runs = nn.Linear(4, 4), wrap, 0

    def forward(self, x):
        self.runs += 1
        return self.wrap(self.linear(x).tanh())


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_blocks_by_index_and_modules_by_name_come_back_under_the_name_asked():
    model, x = Net(), torch.randn(2, 4)
    with kdloss.capture(model, [0, -1, "blocks.1", "head"]) as seen:
        out = model(x)
    expected = model.blocks[0].linear(x).tanh()
    assert set(seen) == {0, -1, "blocks.1", "head"}
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen["blocks.1"], model.blocks[1].linear(expected).tanh())
    assert seen["head"] is out
    assert seen.output is out
    assert hooks(model) == 0
    with pytest.raises(KeyError, match="was not captured"):
        seen[1]


def test_one_module_under_two_names_is_hooked_once_and_found_under_both():
    model = Net()
    model.alias = model.blocks[1]
    with kdloss.capture(model, ["alias", 1, "blocks.1"]) as seen:
        model(torch.randn(2, 4))
    assert seen["alias"] is seen[1] is seen["blocks.1"]


Pair = namedtuple("Pair", "hidden cache")


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, None), lambda x: [None, x], lambda x: {"hidden": x}, lambda x: Pair(x, 3)],
    ids=["tuple", "list", "dict", "namedtuple"],
)
def test_the_first_tensor_of_a_tuple_dict_or_output_counts(wrap):
    block = Block(wrap)
    with kdloss.capture(nn.Sequential(block), ["0"]) as seen:
        block(torch.ones(1, 4))
    assert seen["0"].shape == (1, 4)


def test_an_output_without_a_tensor_is_refused():
    model = nn.Sequential(Block(lambda x: ("nothing",)))
    with pytest.raises(TypeError, match="holds no tensor"), kdloss.capture(model, ["0"]):
        model(torch.ones(1, 4))
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception_and_an_interrupt():
    for error in (RuntimeError, KeyboardInterrupt):
        model = Net()
        with pytest.raises(error), kdloss.capture(model, [0]):
            raise error
        assert hooks(model) == 0
    model = Net()
    with pytest.raises(RuntimeError, match="shapes"), kdloss.capture(model, [0]):
        model(torch.ones(1, 9))
    assert hooks(model) == 0


def test_a_name_that_does_not_exist_is_refused_before_anything_is_hooked():
    model = Net()
    for name, match in [("blocks.9", "nearest"), (3, "3 blocks, 0 to 2"), (-4, "does not exist")]:
        with pytest.raises(ValueError, match=match), kdloss.capture(model, [0, name]):
            pass
    assert hooks(model) == 0


def test_a_module_that_did_not_run_is_an_error():
    model = Net(skip=True)
    with (
        pytest.raises(RuntimeError, match=r"\[1\].*did not run.*torch\.compile"),
        kdloss.capture(model, [1]),
    ):
        model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="did not run"), kdloss.capture(model, [0]):
        pass


def test_a_module_that_ran_twice_is_an_error():
    model = Net(twice=True)
    with pytest.raises(RuntimeError, match="more than once"), kdloss.capture(model, [2]):
        model(torch.ones(1, 4))
    model = Net()
    with pytest.raises(RuntimeError, match="one forward pass"), kdloss.capture(model, [0]):
        [model(torch.ones(1, 4)) for _ in range(2)]
    assert hooks(model) == 0


def test_an_output_changed_in_place_afterwards_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match="inplace=False"), kdloss.capture(model, ["0"]):
        model(torch.randn(2, 4))
    with kdloss.capture(model, ["1"]) as seen:
        model(torch.randn(2, 4))
    assert (seen["1"] >= 0).all()


def test_stop_ends_the_pass_at_the_deepest_module_needed():
    model = Net()
    with kdloss.capture(model, [0, 1], stop=True) as seen:
        model(torch.ones(1, 4))
        pytest.fail("the pass did not end")
    assert [block.runs for block in model.blocks] == [1, 1, 0]
    assert seen.output is None
    assert hooks(model) == 0


def test_non_reentrant_checkpointing_gives_the_plain_gradient():
    plain = Net()
    model = copy.deepcopy(plain)
    model.checkpointing = "non-reentrant"
    for net in (plain, model):
        with kdloss.capture(net, [1]) as seen:
            net(torch.ones(2, 4))
        seen[1].square().sum().backward()
    assert model.blocks[1].runs == 2, "run again in backward, unseen"
    for a, b in zip(plain.blocks.parameters(), model.blocks.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_reentrant_checkpointing_is_refused_rather_than_trained_on_nothing():
    model = Net(checkpointing="reentrant")
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), kdloss.capture(model, [1]):
        model(x)
    assert hooks(model) == 0


def test_frozen_blocks_and_no_grad_are_not_mistaken_for_it():
    model = Net()
    with torch.no_grad(), kdloss.capture(model, [1]) as seen:
        model(torch.ones(2, 4))
    assert not seen[1].requires_grad
    model.blocks.requires_grad_(False)
    with kdloss.capture(model, [1]) as seen:
        model(torch.ones(2, 4))
    assert not seen[1].requires_grad


def test_nested_captures_keep_their_own_record():
    model = Net()
    with kdloss.capture(model, [0]) as outer, kdloss.capture(model, [0, 1]) as inner:
        model(torch.ones(1, 4))
    assert list(outer) == [0]
    assert inner[0] is outer[0]
    with kdloss.capture(model, [0]) as outer, kdloss.capture(model, [1], stop=True) as inner:
        model(torch.ones(1, 4))
    assert (list(outer), list(inner)) == ([0], [1])
    with kdloss.capture(model, [0], stop=True) as outer, kdloss.capture(model, [2]) as inner:
        model(torch.ones(1, 4))
    assert (list(outer), list(inner)) == ([0], [])
    assert hooks(model) == 0


def test_threads_record_their_own_passes_on_one_model():
    model, results = Net(), {}
    inside = threading.Barrier(2, timeout=10)

    def work(value):
        with kdloss.capture(model, [0]) as seen:
            inside.wait()
            model(torch.full((1, 4), value))
            inside.wait()
        results[value] = seen[0]

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert set(results) == {1.0, 2.0}
    for value, got in results.items():
        assert torch.equal(got, model.blocks[0].linear(torch.full((1, 4), value)).tanh())


def test_a_model_compiled_before_is_refused_never_silently_empty():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    compiled = torch.compile(model, backend="eager")
    x = torch.ones(1, 4)
    compiled(x)
    with (
        pytest.raises(RuntimeError, match=r"did not run.*compile its blocks"),
        kdloss.capture(compiled, ["0"]),
    ):
        compiled(x)
    with kdloss.capture(compiled, ["0"]) as seen:
        model(x)
    assert torch.equal(seen["0"], model[0](x))


def test_a_hooked_model_can_be_copied_and_pickled_and_the_copy_is_independent():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with kdloss.capture(model, ["0"]) as seen:
        twin = pickle.loads(pickle.dumps(model.state_dict()))
        model(torch.ones(1, 4))
    assert torch.equal(twin["0.weight"], model[0].weight)
    assert seen["0"].shape == (1, 4)
    assert hooks(copy.deepcopy(model)) == 0


def test_float16_and_inference_mode_pass_through():
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    with torch.inference_mode(), kdloss.capture(model, ["0"]) as seen:
        model(torch.ones(1, 4, dtype=torch.bfloat16))
    assert seen["0"].dtype == torch.bfloat16
