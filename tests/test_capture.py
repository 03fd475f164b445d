"""`capture` records one forward pass with hooks inside a `with`, and raises an error if nothing was recorded.

In order: what is recorded; modules used several times; outputs changed in place; early stop; checkpointing;
torch.compile; several requests for one module; cached lookups of modules; copies; exceptions and memory; nested
captures and threads; several processes.
"""

import copy
import gc
import io
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import capture_processes
import pytest
import torch
from families import ResNet, batch, build, checkpointing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import AlbertConfig, AlbertModel
from versions import since_torch, since_transformers_5

import kdloss
from kdloss._capture import Located, Request, located, record

# Dynamo raises this warning where a compiled block gets the output of another one.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Net(nn.Module):
    """Three blocks, and options to skip, checkpoint, reorder or replace them."""

    def __init__(self, skip=False, checkpointing=None, order=(0, 1, 2), block=None):
        super().__init__()
        self.blocks = nn.ModuleList((block or Counting)() for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.skip, self.checkpointing, self.order = skip, checkpointing, order

    def forward(self, x):
        for i in self.order:
            if self.skip and i == 1:
                continue
            if self.checkpointing is None:
                x = self.blocks[i](x)
            else:
                x = checkpoint(self.blocks[i], x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).tanh()


class Counting(Block):
    """A block that counts its runs; `torch.compile` would make a new graph for each count."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


class Wrapped(nn.Module):
    """A linear layer whose output goes through a function `wrap`."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


def by_hand(model, x, count):
    """The output of the first `count` blocks of a `Net`, computed without its modules' forward."""
    for block in model.blocks[:count]:
        x = (x @ block.linear.weight.T + block.linear.bias).tanh()
    return x


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)


def assert_all_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


# What is recorded


def test_blocks_by_index_and_modules_by_name_are_returned_under_the_requested_name():
    model, x = Net(), torch.randn(2, 4)
    with kdloss.capture(model, [0, -1, "blocks.1", "head"]) as seen:
        out = model(x)
    assert set(seen) == {0, -1, "blocks.1", "head"}
    for name, count in ((0, 1), ("blocks.1", 2), (-1, 3)):
        torch.testing.assert_close(seen[name], by_hand(model, x, count))
    assert seen["head"] is out
    assert seen.output is out
    assert hooks(model) == 0
    with pytest.raises(KeyError, match="was not captured"):
        seen[1]


def test_one_module_under_two_names_is_hooked_once_and_returned_under_both():
    model = Net()
    model.alias = model.blocks[1]
    with kdloss.capture(model, ["alias", 1, "blocks.1", 1]) as seen:
        assert len(model.alias._forward_hooks) == 1
        model(torch.randn(2, 4))
    assert seen["alias"] is seen[1] is seen["blocks.1"]


def test_a_name_that_does_not_exist_is_refused_before_anything_is_hooked():
    model = Net()
    for name, match in [("blocks.9", "nearest"), (3, "3 blocks, 0 to 2"), (-4, "does not exist")]:
        with pytest.raises(ValueError, match=match), kdloss.capture(model, [0, name]):
            pass
    assert hooks(model) == 0


class ByKeyword(nn.Module):
    """A model that takes keyword arguments only and calls its submodules with keywords."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, *, hidden):
        return {"out": self.outer(input=self.inner(input=hidden))}


def test_models_and_modules_called_by_keywords_only_are_recorded():
    model, x = ByKeyword(), torch.randn(2, 4)
    with kdloss.capture(model, ["inner"]) as seen:
        out = model(hidden=x)
    torch.testing.assert_close(seen["inner"], x @ model.inner.weight.T + model.inner.bias)
    assert seen.output is out
    with kdloss.capture(model, ["inner"], stop=True) as seen:
        model(hidden=x)
        pytest.fail("the pass did not end")
    assert list(seen) == ["inner"]
    gpt2, inputs = build("gpt2", depth=2), batch("gpt2")
    with torch.no_grad(), kdloss.capture(gpt2, [0]) as seen:
        expected = gpt2(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[1]
    assert torch.equal(seen[0], expected)


Pair = namedtuple("Pair", "hidden cache")
WRAPS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None),
    "list": lambda x: [None, x],
    "dict": lambda x: {"hidden": x, "other": x + 1},
    "namedtuple": lambda x: Pair(x, 3),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_the_first_tensor_of_an_output_is_captured_by_default(wrap):
    model, x = nn.Sequential(Wrapped(wrap)), torch.randn(2, 4)
    with kdloss.capture(model, ["0"]) as seen:
        model(x)
    torch.testing.assert_close(seen["0"], model[0].linear(x))


@dataclass
class Held:
    values: torch.Tensor
    rest: int = 0


TAKES = {
    "index": (lambda x: (None, -x, x), 2),
    "negative index": (lambda x: (-x, x), -1),
    "key": (lambda x: {"other": -x, "hidden": x}, "hidden"),
    "attribute": (lambda x: Pair(-x, x), "cache"),
    "attribute of a dataclass": (lambda x: Held(x), "values"),
    "path": (lambda x: (-x, {"values": [-x, x]}), (1, "values", 1)),
    "function": (lambda x: (-x, [x / 2]), lambda output: output[1][0] * 2),
}


@pytest.mark.parametrize(("wrap", "take"), TAKES.values(), ids=TAKES)
def test_take_is_an_index_a_key_a_path_or_a_function(wrap, take):
    model, x = nn.Sequential(Wrapped(wrap)), torch.randn(2, 4)
    with kdloss.capture(model, ["0"], take=take) as seen:
        model(x)
    torch.testing.assert_close(seen["0"], model[0].linear(x))
    assert_all_close(gradients(seen["0"].square().sum(), model), gradients(model[0].linear(x).square().sum(), model))


def test_take_may_differ_between_two_names_of_one_module():
    model, x = nn.ModuleDict({"a": Wrapped(lambda x: (x, -x))}), torch.randn(2, 4)
    model["b"] = model["a"]
    with kdloss.capture(model, ["a", "b", "a.linear"], take={"b": 1, "a": lambda o: 2 * o[0]}) as seen:
        model["a"](x)
    y = model["a"].linear(x)
    assert_all_close([seen["a"], seen["b"], seen["a.linear"]], [2 * y, -y, y])


@pytest.mark.parametrize(
    ("wrap", "take", "match"),
    [
        (lambda x: ("nothing", None), None, r"'0' returned a tuple of \[a str, None\]; holds no tensor"),
        (lambda x: ((x,),), None, r"a tuple of \[a tuple of \[a Tensor of shape \(2, 4\)\]\]; holds no"),
        (
            lambda x: Held(x),
            None,
            r"a Held with \['values', 'rest'\]; holds no tensor.*take=\(1, 'hidden'\)",
        ),
        (lambda x: (x, x), 2, r"a tuple of \[a Tensor.*take=2 finds no tensor"),
        (lambda x: {"hidden": x}, "hiden", r"a dict of \{'hidden': a Tensor.*take='hiden' finds no tensor"),
        (lambda x: (x, {}), (1, "a"), r"take=\(1, 'a'\) finds no tensor"),
        (lambda x: x, 0, r"a Tensor of shape \(2, 4\); take=0 finds"),  # not example 0 of the batch
        (lambda x: (x,), lambda output: 3, "finds no tensor there"),
    ],
)
def test_an_output_without_the_requested_tensor_is_refused_and_its_contents_are_listed(wrap, take, match):
    model = nn.Sequential(Wrapped(wrap))
    with pytest.raises(TypeError, match=match), kdloss.capture(model, ["0"], take=take):
        model(torch.ones(2, 4))
    assert hooks(model) == 0


def test_options_for_names_that_are_not_captured_are_refused():
    for option in ("take", "which"):
        with (
            pytest.raises(ValueError, match=rf"{option} has \['1'\].*not among the names to capture, \[1\]"),
            kdloss.capture(Net(), [1], **{option: {"1": 0}}),
        ):
            pass


def test_features_captured_in_inference_mode_are_unchanged_and_may_be_used_in_a_loss():
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).bfloat16(),
        torch.randn(2, 4).bfloat16(),
    )
    with torch.inference_mode(), kdloss.capture(model, ["0"]) as seen:
        model(x)
    assert seen["0"].dtype == torch.bfloat16
    assert torch.equal(seen["0"], model[0](x))  # with the negative values that the in-place ReLU replaces
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    (seen["0"] * weight).sum().backward()
    assert torch.equal(weight.grad, seen["0"].sum(0))


def test_features_under_autocast_have_the_autocast_dtype():
    model, x = Net(), torch.randn(2, 4)
    with (
        torch.autocast("cpu", torch.bfloat16),
        kdloss.capture(model, ["blocks.0.linear"], stop=True) as seen,
    ):
        model(x)
    assert seen["blocks.0.linear"].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    assert model(x).dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.device("meta"), FakeTensorMode()], ids=["meta", "fake"])
def test_features_of_passes_without_data_have_the_right_shapes(mode):
    with mode:
        model = Net()
        with kdloss.capture(model, [0, "head"], which={0: "all"}) as seen:
            model(torch.ones(3, 4))
    assert (seen[0][0].shape, seen["head"].shape) == ((3, 4), (3, 2))


def test_a_module_that_did_not_run_is_an_error():
    model = Net(skip=True)
    with (
        pytest.raises(RuntimeError, match=r"\[1\] did not run.*torch\.compile"),
        kdloss.capture(model, [1]),
    ):
        model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="did not run"), kdloss.capture(model, [0]):
        pass


# Modules used several times


def net_reusing_block_0(order=(0, 2, 0, 0)):
    model, x = Net(order=order), torch.randn(2, 4)
    expected, y = [], x
    for i in order:
        y = model.blocks[i].linear(y).tanh()
        expected.append(y)
    return model, x, [y for i, y in zip(order, expected, strict=True) if i == 0]


def test_a_module_that_ran_twice_is_an_error():
    model, x, _ = net_reusing_block_0()
    with pytest.raises(RuntimeError, match=r"more than once.*which='first', 'last', 'all'"):  # noqa: SIM117
        with kdloss.capture(model, [0]):
            model(x)
    model = Net()
    with pytest.raises(RuntimeError, match="one forward pass"), kdloss.capture(model, [0]):
        [model(torch.ones(1, 4)) for _ in range(2)]
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("which", "number"), [("first", 0), ("last", 2), (0, 0), (1, 1), (2, 2), (-1, 2), (-2, 1), (-3, 0)]
)
def test_which_chooses_one_of_several_runs(which, number):
    model, x, expected = net_reusing_block_0()
    with kdloss.capture(model, [0, 2], which={0: which}) as seen:
        model(x)
    torch.testing.assert_close(seen[0], expected[number])
    torch.testing.assert_close(seen[2], model.blocks[2].linear(by_hand(model, x, 1)).tanh())
    loss, other = seen[0].square().sum(), expected[number].square().sum()
    assert_all_close(gradients(loss, model), gradients(other, model))


def test_which_all_returns_a_list_in_order_and_which_may_differ_between_names_of_one_module():
    model, x, expected = net_reusing_block_0()
    with kdloss.capture(model, [0, "blocks.0"], which={0: "all", "blocks.0": 1}) as seen:
        model(x)
    assert_all_close(seen[0], expected)
    assert seen["blocks.0"] is seen[0][1]
    with kdloss.capture(model, [2, 2], which="all") as seen:
        model(x)
    assert len(seen[2]) == 1


def test_the_shared_layer_of_albert_is_refused_unless_all_its_runs_are_requested():
    config = AlbertConfig(
        num_hidden_layers=4, hidden_size=8, embedding_size=8, intermediate_size=8, num_attention_heads=2,
        vocab_size=11, attn_implementation="eager",
    )  # fmt: skip
    model, tokens = AlbertModel(config).eval(), torch.tensor([[1, 2, 3]])
    name = "encoder.albert_layer_groups.0"
    with pytest.raises(RuntimeError, match="more than once"), kdloss.capture(model, [name]):
        model(tokens)
    with kdloss.capture(model, [name], which="all") as seen:
        expected = model(tokens, output_hidden_states=True).hidden_states
    assert_all_close(seen[name], expected[1:])


@pytest.mark.parametrize("which", [3, -4])
def test_a_run_that_did_not_happen_is_an_error(which):
    model, x, _ = net_reusing_block_0()
    with pytest.raises(RuntimeError, match=rf"\[0\] ran 3 times, not as often as which={which}"):  # noqa: SIM117
        with kdloss.capture(model, [0], which=which):
            model(x)


def test_an_unknown_which_is_refused():
    for which in ("both", None, 1.5):
        with (
            pytest.raises(ValueError, match=r"which=.*is unknown; choose"),
            kdloss.capture(Net(), [0], which=which),
        ):
            pass


# Outputs changed in place


class Residual(nn.Module):
    """A ResNet block: ReLU changes the output of the first norm in place, += that of the second."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.norm2 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.norm2(self.conv(self.relu(self.norm(self.conv(x)))))
        out += x
        return self.relu(out)


@pytest.mark.parametrize("name", ["norm", "norm2"])
def test_an_output_that_is_later_changed_in_place_is_an_error_unless_it_is_cloned(name):
    model, x = Residual().double(), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"inplace=True\) or \+=; write take=torch\.clone"):  # noqa: SIM117
        with kdloss.capture(model, [name]):
            model(x)
    with kdloss.capture(model, [name], take=torch.clone) as seen:
        out = model(x)
    first = model.norm(model.conv(x))
    second = model.norm2(model.conv(first.relu()))
    expected = {"norm": first, "norm2": second}[name]
    torch.testing.assert_close(seen[name], expected)
    assert seen[name].min() < 0
    loss, other = seen[name].pow(3).sum() + out.sum(), expected.pow(3).sum() + (second + x).relu().sum()
    assert_all_close(gradients(loss, model), gradients(other, model))


def test_the_output_of_an_in_place_relu_is_captured_correctly():
    model, x = Residual(), torch.randn(3, 2, 4, 4)
    with kdloss.capture(model, ["relu"], which="all", take=torch.clone) as seen:
        out = model(x)
    assert torch.equal(seen["relu"][1], out)
    torch.testing.assert_close(seen["relu"][0], model.norm(model.conv(x)).relu())


def test_a_change_in_place_is_noticed_in_the_last_of_several_outputs():
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    model = nn.ModuleList([model, model])
    with (
        pytest.raises(RuntimeError, match="'0' was changed"),
        kdloss.capture(model, ["0"], which="all"),
    ):
        (model[0](x), model[1](x).zero_())


# Early stop


def test_stop_ends_the_pass_after_the_deepest_captured_module():
    model, x = Net(), torch.randn(2, 4)
    with kdloss.capture(model, [0, 1], stop=True) as seen:
        model(x)
        pytest.fail("the pass did not end")
    assert [block.runs for block in model.blocks] == [1, 1, 0]
    assert_all_close([seen[0], seen[1]], [by_hand(model, x, 1), by_hand(model, x, 2)])
    assert seen.output is None
    assert hooks(model) == 0
    assert model(x).shape == (2, 2)


def test_stop_waits_for_the_captured_module_that_runs_last_also_inside_a_block():
    model, x = Net(order=(2, 0, 1)), torch.randn(2, 4)
    with kdloss.capture(model, [0, 2, "blocks.2"], stop=True) as seen:
        model(x)
    assert [block.runs for block in model.blocks] == [1, 0, 1]
    assert seen[2] is seen["blocks.2"]
    torch.testing.assert_close(seen[0], model.blocks[0](model.blocks[2](x)))
    model, later = Net(), []
    model.blocks[1].register_forward_hook(lambda *_: later.append("block 1, which its linear layer ended"))
    model.head.register_forward_pre_hook(lambda *_: later.append("head"))
    with kdloss.capture(model, [0, "blocks.1.linear"], stop=True) as seen:
        model(x)
    torch.testing.assert_close(seen["blocks.1.linear"], model.blocks[1].linear(by_hand(model, x, 1)))
    assert later == []
    with kdloss.capture(model, ["head"], stop=True) as seen:
        model(x)
    torch.testing.assert_close(seen["head"], model.head(by_hand(model, x, 3)))


def test_stop_counts_runs_and_refuses_a_run_that_is_known_only_at_the_end():
    model, x, expected = net_reusing_block_0()
    with kdloss.capture(model, [0], which=1, stop=True) as seen:
        model(x)
    assert [block.runs for block in model.blocks] == [2, 0, 1]
    torch.testing.assert_close(seen[0], expected[1])
    for which in ("last", "all", -2):
        with (
            pytest.raises(ValueError, match=r"known at the end of the pass only.*stop=False"),
            kdloss.capture(model, [0], which={0: which}, stop=True),
        ):
            pass


class CatchesErrors(nn.Module):
    """A model that continues after an exception of its block."""

    def __init__(self, error):
        super().__init__()
        self.block, self.tail, self.error, self.caught = Counting(), Counting(), error, 0

    def forward(self, x):
        try:
            x = self.block(x)
        except self.error:
            self.caught += 1
        return self.tail(x)


def test_a_model_that_catches_exceptions_does_not_catch_those_of_capture():
    model = CatchesErrors(Exception)
    with kdloss.capture(model, ["block"], stop=True) as seen:
        model(torch.ones(1, 4))
    assert (model.caught, model.tail.runs, list(seen)) == (0, 0, ["block"])
    with (
        pytest.raises(TypeError, match="no tensor"),
        kdloss.capture(model, ["block"], take=lambda output: None),
    ):
        model(torch.ones(1, 4))
    assert (model.caught, model.tail.runs) == (0, 0)
    model = CatchesErrors(BaseException)  # the error is raised even if the model catches BaseException
    with (
        pytest.raises(TypeError, match="no tensor"),
        kdloss.capture(model, ["block"], take=lambda output: None),
    ):
        model(torch.ones(1, 4))
    assert model.caught == 1


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_stopped_pass_leaves_model_and_grad_mode_unchanged_under_every_context(backend):
    model, x = Net(block=Block), torch.randn(2, 4)
    if backend:
        for block in model.blocks:
            block.compile(backend=backend)
    expected = model(x)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context, kdloss.capture(model, [1], stop=True) as seen:
            model(x)
        torch.testing.assert_close(seen[1].float(), by_hand(model, x, 2), rtol=0.02, atol=0.02, check_stride=False)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert torch.equal(model(x), expected)


# Activation checkpointing


@pytest.mark.parametrize("inside", [False, True])
def test_non_reentrant_checkpointing_gives_the_gradient_of_the_plain_model(inside):
    plain, x = Net(), torch.randn(2, 4)
    model = copy.deepcopy(plain)
    model.checkpointing = "non-reentrant"
    with set_checkpoint_early_stop(not inside), kdloss.capture(model, [1], which="all") as seen:
        out = model(x)
        loss = seen[1][0].square().sum() + out.sum()
        if inside:
            loss.backward()
    assert len(seen[1]) == 1, "what backward runs again is no run of the model's"
    if not inside:
        loss.backward()
    assert model.blocks[1].runs == 2
    (by_hand(plain, x, 2).square().sum() + plain.head(by_hand(plain, x, 3)).sum()).backward()
    assert_all_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_reentrant_checkpointing_is_refused_because_features_would_have_no_gradient():
    model = Net(checkpointing="reentrant")
    x = torch.ones(2, 4, requires_grad=True)
    for take in (None, torch.clone):
        with (
            pytest.raises(RuntimeError, match="use_reentrant=False"),
            kdloss.capture(model, [1], take=take),
        ):
            model(x)
    assert hooks(model) == 0


def test_frozen_blocks_under_reentrant_checkpointing_are_captured_correctly():
    model, x = Net(checkpointing="reentrant"), torch.randn(2, 4, requires_grad=True)
    model.blocks.requires_grad_(False)
    with kdloss.capture(model, [1]) as seen:
        model(x).sum().backward()
    torch.testing.assert_close(seen[1], by_hand(model, x, 2))
    (grad,) = torch.autograd.grad(model.head(by_hand(model, x, 3)).sum(), x)
    torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=since_transformers_5)])
def test_transformers_checkpointing_works_for_blocks_and_inside_blocks_is_refused_if_reentrant(reentrant):
    """It checkpoints a block's forward: hooks on the block get its output with the graph, hooks inside may not."""
    plain, inputs = build("gpt2", depth=3).train(), batch("gpt2")
    tokens = inputs["input_ids"]
    model = copy.deepcopy(plain)
    checkpointing(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with kdloss.capture(model, [1]) as seen:
        model(tokens)
    seen[1].square().mean().backward()
    plain(tokens, output_hidden_states=True).hidden_states[2].square().mean().backward()
    assert_all_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    part = kdloss.capture(model, ["transformer.h.1.mlp"])
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"), part:
            model(tokens)
        return
    with part as seen:
        model(tokens)
    model.zero_grad()
    plain.zero_grad()
    seen["transformer.h.1.mlp"].square().mean().backward()
    outputs = []
    handle = plain.transformer.h[1].mlp.register_forward_hook(lambda *hooked: outputs.append(hooked[2]))
    plain(tokens)
    handle.remove()
    outputs[0].square().mean().backward()
    assert_all_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_frozen_blocks_and_no_grad_are_not_mistaken_for_reentrant_checkpointing():
    model, x = Net(), torch.ones(2, 4)
    with torch.no_grad(), kdloss.capture(model, [1]) as seen:
        model(x)
    assert not seen[1].requires_grad
    with kdloss.capture(model, [1]) as seen, torch.no_grad():
        model(x)
    assert not seen[1].requires_grad
    with torch.no_grad(), kdloss.capture(model, [1]) as seen, torch.enable_grad():
        model(x)
    assert seen[1].requires_grad
    with kdloss.capture(model, [1], take=lambda output: output.argmax(-1)) as seen:
        model(x)
    assert seen[1].dtype == torch.int64
    model.blocks.requires_grad_(False)
    with kdloss.capture(model, [1]) as seen:
        model(x)
    assert not seen[1].requires_grad


# torch.compile


@pytest.fixture
def graphs():
    """Return a backend for `torch.compile`, and the list of the graphs that it has run."""
    torch._dynamo.reset()
    ran = []

    def backend(graph, inputs):
        def run(*args):
            ran.append(graph)
            return graph(*args)

        return run

    yield backend, ran
    torch._dynamo.reset()


def assert_capture_matches_eager(call, model, x, names=(0, 2)):
    """Assert that values and gradients of features and output equal those computed by hand."""
    with kdloss.capture(model, names) as seen:
        out = call(x)
    net = model._orig_mod if "_orig_mod" in model._modules else model
    loss = sum(seen[i].square().sum() for i in names) + out.sum()
    blocks = [by_hand(net, x, i + 1) for i in names]
    assert_all_close([seen[i] for i in names], blocks)
    expected = sum(b.square().sum() for b in blocks) + net.head(by_hand(net, x, 3)).sum()
    assert_all_close(gradients(loss, model), gradients(expected, model))


def compile_blocks(model, backend):
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def compile_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compile_with_a_wrapper(model, backend):
    return torch.compile(model, backend=backend)


WAYS_TO_COMPILE = {
    "blocks": compile_blocks,
    "model.compile()": compile_in_place,
    "torch.compile(model)": compile_with_a_wrapper,
}


@since_torch(2, 6)
@pytest.mark.parametrize("way", WAYS_TO_COMPILE)
@pytest.mark.parametrize("order", ["never run", "run before", "captured before"])
def test_captures_of_compiled_models_match_eager_ones_in_every_order(way, order, graphs, caplog):
    (backend, ran), model, x = graphs, Net(block=Block), torch.randn(2, 4)
    if order == "captured before":
        assert_capture_matches_eager(model, model, x)
    model = WAYS_TO_COMPILE[way](model, backend)
    if order == "run before":
        model(x)
        assert ran
        with torch.no_grad():
            model(x)
    for names in ((0, 2), (1,), (0, 2)):  # each pass has hooks of its own
        assert_capture_matches_eager(model, model, torch.randn(2, 4), names)
    messages = [record.message for record in caplog.records if record.name == "kdloss"]
    if way == "blocks":
        assert messages == []
    else:
        assert len(messages) == 1
        assert "Net was compiled as a whole" in messages[0]
        assert "block.compile()" in messages[0]
    ran.clear()
    model(x)
    assert ran, "outside of captures it is compiled as ever"
    with kdloss.capture(model, [0, 1], stop=True) as seen:
        model(x)
    net = getattr(model, "_orig_mod", model)
    assert_all_close([seen[0], seen[1]], [by_hand(net, x, 1), by_hand(net, x, 2)])


@since_torch(2, 6)
def test_the_modules_of_a_cnn_that_the_warning_says_to_compile_stay_compiled_while_they_are_captured(graphs, caplog):
    (backend, ran), x, names = graphs, torch.randn(2, 3, 8, 8), ["first", "second"]

    class Cnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.second(self.first(x))

    model = Cnn()
    with pytest.raises(ValueError, match=r"no nn\.ModuleList of equal blocks"):
        kdloss.layers.find_blocks(model)
    with kdloss.capture(compile_with_a_wrapper(model, backend), names) as expected:
        model(x)
    (warning,) = (record.message for record in caplog.records if record.name == "kdloss")
    line = re.search(r"model\.get_submodule\(name\)\.compile\(", warning)[0]
    caplog.clear()
    for name in names:
        eval(f"{line}backend=backend)", {"model": model, "name": name, "backend": backend})
    for _ in range(2):
        with kdloss.capture(model, names) as seen:
            model(x)
        assert_all_close([seen[name] for name in names], [expected[name] for name in names])
    assert len(ran) == 4
    assert not [record for record in caplog.records if record.name == "kdloss"]


def test_compiled_blocks_stay_compiled_and_are_not_compiled_again(graphs):
    (backend, ran), model, x = graphs, Net(block=Block), torch.randn(2, 4)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend=backend)
    for _ in range(10):
        with kdloss.capture(model, [0, "blocks.2"]) as seen:
            model(x)
    assert len(ran) == 30
    assert set(ran) == set(ran[:3])
    assert torch.equal(seen["blocks.2"], by_hand(model, x, 3))


def test_a_model_without_features_to_capture_stays_compiled(graphs, caplog):
    (backend, ran), model, x = graphs, Net(block=Block), torch.randn(2, 4)
    compiled = torch.compile(model, backend=backend)
    with kdloss.capture(compiled, []) as seen:
        out = compiled(x)
    assert ran
    assert seen.output is out
    assert not [record for record in caplog.records if record.name == "kdloss"]


def test_captures_match_eager_ones_under_a_backend_that_also_compiles_the_backward():
    torch._dynamo.reset()
    model, x = Net(block=Block), torch.randn(2, 4)
    compile_blocks(model, "aot_eager")
    model(x)
    assert_capture_matches_eager(model, model, x)


def test_a_function_compiled_before_the_capture_is_refused_because_its_graph_has_no_hooks(graphs):
    """`capture` cannot find the compiled function, because the model does not refer to it."""
    (backend, _), model, x = graphs, Net(block=Block), torch.randn(2, 4)
    assert_capture_matches_eager(torch.compile(lambda x: model(x), backend=backend), model, x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x), backend=backend)
    compiled(x)
    with pytest.raises(RuntimeError, match=r"\[0\] did not run.*torch\.compile.*block\.compile\(\)"):  # noqa: SIM117
        with kdloss.capture(model, [0]):
            compiled(x)


def test_a_graph_compiled_in_one_capture_writes_nothing_into_it_during_the_next(graphs):
    backend, _ = graphs
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4)
    compiled = torch.compile(lambda x: model[2](model[1](model[0](x))), backend=backend)
    with kdloss.capture(model, ["0"]) as first:
        compiled(x)
    feature = first["0"]
    with kdloss.capture(model, ["0"]) as second:
        compiled(x + 1)
    torch.testing.assert_close(feature, model[0](x))
    assert first["0"] is feature
    torch.testing.assert_close(second["0"], model[0](x + 1))
    dead = weakref.ref(feature)
    del feature, first
    gc.collect()
    assert dead() is None


def test_under_torch_without_set_stance_the_error_says_to_compile_blocks(graphs, monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    model = torch.compile(Net(block=Block), backend="eager")
    with (
        pytest.raises(RuntimeError, match=r"before torch 2\.6; compile its blocks"),
        kdloss.capture(model, [0]),
    ):
        pass
    assert hooks(model) == 0


@since_torch(2, 6)
def test_captures_of_compiled_models_in_threads_leave_the_compiler_switched_on(graphs):
    (backend, ran), model, x = graphs, Net(block=Block), torch.randn(2, 4)
    compiled = torch.compile(model, backend=backend)
    both, first_is_done = threading.Barrier(2, timeout=10), threading.Event()

    def work(first):
        with kdloss.capture(compiled, [0]) as seen:
            both.wait()
            if not first:
                assert first_is_done.wait(10)
            compiled(x)
        torch.testing.assert_close(seen[0], by_hand(model, x, 1))
        first_is_done.set()

    other = threading.Thread(target=work, args=(False,))
    other.start()
    work(True)
    other.join()
    assert ran == []
    compiled(x)
    assert ran


# Several requests for one module


@pytest.fixture
def searches(monkeypatch):
    """List the searches through the modules of a model."""
    calls = []

    def counted(search):
        def count(model, name):
            calls.append(name)
            return search(model, name)

        return count

    monkeypatch.setattr(located, "find_blocks", counted(located.find_blocks))
    monkeypatch.setattr(located, "resolve", counted(located.resolve))
    return calls


def test_two_takes_of_one_module_come_from_one_pass_and_one_hook():
    model, x = nn.ModuleDict({"a": Wrapped(lambda y: (y, {"other": -y}))}), torch.randn(2, 4)
    model["alias"] = model["a"]
    requests = {
        "first": Request("a"),
        ("any", "key"): Request("a", take=(1, "other")),
        7: Request("a", take=lambda output: 2 * output[0], which="all"),
        Request("alias"): Request("alias", take=1 - 1),
        "part": Request("a.linear", take=torch.clone),
    }
    with record(model, requests) as seen:
        assert (len(model["a"]._forward_hooks), len(model["a"].linear._forward_hooks)) == (1, 1)
        model["a"](x)
    y = model["a"].linear(x)
    assert set(seen) == set(requests)
    assert_all_close(
        [seen["first"], seen["any", "key"], *seen[7], seen[Request("alias")], seen["part"]], [y, -y, 2 * y, y, y]
    )
    assert hooks(model) == 0


def test_each_request_counts_blocks_in_the_list_that_it_names(searches):
    model, inputs = build("t5", depth=2), batch("t5")
    requests = {side: Request(-1, blocks=f"{side}.block") for side in ("encoder", "decoder")}
    cache = Located()
    for _ in range(2):
        with record(model, requests, located=cache) as seen:
            model(**inputs)
    assert searches == ["encoder.block", "decoder.block"]
    for side in requests:
        with kdloss.capture(model, [1], blocks=f"{side}.block") as direct:
            model(**inputs)
        torch.testing.assert_close(seen[side], direct[1])
    assert not torch.equal(seen["encoder"][:, :1], seen["decoder"][:, :1])


def test_stop_waits_for_every_request():
    model, x = Net(order=(0, 1, 0, 2)), torch.randn(2, 4)
    requests = {"once more": Request(0, which=1), "first": Request(0, which="first"), "other": Request("blocks.1")}
    with record(model, requests, stop=True) as seen:
        model(x)
    assert [block.runs for block in model.blocks] == [2, 1, 0]
    assert_all_close([seen["first"], seen["other"]], [by_hand(model, x, 1), by_hand(model, x, 2)])
    assert set(seen) == set(requests)


def test_error_messages_mention_module_names_and_not_request_keys():
    x, twice = torch.ones(2, 4), {"a": Request(1), "b": Request(1, take=torch.clone)}
    for model, requests, error, match in [
        (Net(skip=True), twice, RuntimeError, r"^\[1\] did not run"),
        (Net(), {"a": Request(0, take=5)}, TypeError, "^block 0 returned a Tensor.*take=5 finds"),
        (Net(order=(0, 0)), {"a": Request(0)}, RuntimeError, "^0 ran more than once"),
        (Net(), {"a": Request(0, which=4)}, RuntimeError, r"^\[0\] ran 1 times, not as often as which=4"),
        (Net(), {"a": Request(0, which="both")}, ValueError, "^which='both' for 0 is unknown"),
        (Net(), {"a": Request("blocks.7")}, ValueError, r"^Net has no module 'blocks\.7'"),
        (Net(), {"a": Request(7)}, ValueError, r"^block 7 does not exist: 3 blocks, 0 to 2"),
    ]:
        for cache in (None, Located()):
            with pytest.raises(error, match=match), record(model, requests, located=cache) as seen:
                model(x)
        assert hooks(model) == 0
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    both = {"a": Request("0", take=torch.clone), "b": Request("0")}
    with pytest.raises(RuntimeError, match=r"^the output of '0' was changed in place"), record(model, both) as seen:
        model(x)
    assert dict(seen) == {}


# Cached lookups of modules


def assert_captured_correctly(model, cache, x=None, net=None):
    """Assert that blocks and a submodule of a `Net`, located by `cache`, have the outputs computed by hand."""
    net, x = net or model, torch.randn(2, 4) if x is None else x
    names = [*range(len(net.blocks)), -1, "blocks.1", "blocks.1.linear"]
    with record(model, {name: Request(name) for name in names}, located=cache) as seen:
        model(x)
    count = len(net.blocks)
    assert_all_close([seen[i] for i in range(count)], [by_hand(net, x, i + 1) for i in range(count)])
    assert_all_close([seen[-1], seen["blocks.1"]], [by_hand(net, x, count), by_hand(net, x, 2)])
    torch.testing.assert_close(seen["blocks.1.linear"].tanh(), seen["blocks.1"])
    assert hooks(model) == 0


def test_blocks_and_names_are_searched_once_for_many_steps(searches):
    model, cache = Net(), Located()
    for _ in range(5):
        assert_captured_correctly(model, cache)
    assert searches == [None, "blocks.1", "blocks.1.linear"]
    assert_captured_correctly(model, None)
    assert len(searches) == 3 + 4 + 2, "without it every request looks"


def test_the_stages_of_a_cnn_are_searched_once(searches):
    model, images, cache = ResNet((2, 1, 3)), torch.randn(2, 3, 8, 8), Located()
    for _ in range(3):
        with record(model, {i: Request(i) for i in range(6)}, located=cache) as seen:
            model(images)
        x = model.conv1(images)
        for i, block in enumerate([*model.layer1, *model.layer2, *model.layer3]):
            x = block(x)
            torch.testing.assert_close(seen[i], x)
    assert searches == [None]


class DoublyWrapped(nn.Module):
    """Two nested wrappers around a model, like DDP around a compiled model."""

    def __init__(self, model):
        super().__init__()
        self.module = nn.Module()
        self.module._orig_mod = model

    def forward(self, x):
        return self.module._orig_mod(x)


@since_torch(2, 6)
def test_a_model_wrapped_between_two_steps_is_searched_once_more(searches):
    model, cache = Net(), Located()
    for outer in (model, DoublyWrapped(model), model, nn.ModuleDict({"module": model})["module"]):
        for _ in range(2):
            assert_captured_correctly(outer, cache, net=model)
    assert len(searches) == 2 * 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # raised inside peft
def test_a_model_is_captured_correctly_after_lora_is_added_between_steps(searches):
    from peft import LoraConfig, get_peft_model

    model, tokens, cache = build("gpt2", depth=2).eval(), batch("gpt2")["input_ids"], Located()
    requests = {name: Request(name) for name in (0, "transformer.h.1", "transformer.h.1.attn.c_attn")}
    lora = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    with record(model, requests, located=cache):
        model(tokens)
    for outer in (get_peft_model(model, lora), model):
        for _ in range(2):
            with record(outer, requests, located=cache) as seen, kdloss.capture(outer, list(requests)) as direct:
                outer(tokens)
            assert all(seen[name] is direct[name] for name in requests)


REPLACEMENTS = {
    "torch.compile": lambda block: torch.compile(block, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper,
    "another block": lambda block: Block(),
}


@since_torch(2, 6)
@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_block_replaced_between_steps_is_captured_and_so_is_the_original_put_back(replace, which):
    torch._dynamo.reset()
    model, cache = Net(block=Block), Located()
    assert_captured_correctly(model, cache)
    before = model.blocks[which]
    model.blocks[which] = replace(before)
    for _ in range(2):
        assert_captured_correctly(model, cache)
    model.blocks[which] = before
    assert_captured_correctly(model, cache)


def test_blocks_added_removed_or_moved_between_steps_are_counted_again():
    model, cache = Net(), Located()

    def change(*blocks):
        model.blocks = nn.ModuleList(blocks)
        model.order = range(len(blocks))
        assert_captured_correctly(model, cache)

    a, b, c = model.blocks
    change(a, b, c)
    change(c, b)
    change(c, b, a, Counting(), Counting())
    model.blocks.append(Counting())
    model.order = range(6)
    assert_captured_correctly(model, cache)
    with (
        pytest.raises(ValueError, match="block 6 does not exist: 6 blocks"),
        record(model, {0: Request(6)}, located=cache),
    ):
        pass


class Moving(Net):
    """A `Net` whose blocks may move into a submodule named `inner`, or `blocks`, which then is no list."""

    def place(self):
        return self if isinstance(self._modules.get("blocks"), nn.ModuleList) else getattr(self, self.inside)

    def forward(self, x):
        for block in self.place().blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("inside", ["inner", "blocks"])
def test_blocks_moved_into_another_module_are_searched_once_more(inside, searches):
    model, cache, x = Moving(), Located(), torch.randn(2, 4)
    model.inside = inside
    for count in (1, 1, 2, 2):
        if count == 2 and model.place() is model:
            outer = nn.Module()
            outer.blocks = model._modules.pop("blocks")
            setattr(model, inside, outer)
        with record(model, {0: Request(0)}, located=cache) as seen:
            model(x)
        assert torch.equal(seen[0], by_hand(model.place(), x, 1))
        assert len(searches) == count


def test_modules_added_to_a_list_that_was_empty_at_the_search_are_not_counted_as_blocks():
    model, cache = Net(), Located()
    model.adapters = nn.ModuleList()
    assert_captured_correctly(model, cache)
    model.adapters.append(nn.Linear(4, 4))
    assert_captured_correctly(model, cache)


def test_submodules_of_wrapped_blocks_are_searched_once(searches):
    model, cache = Net(), Located()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    for _ in range(3):
        assert_captured_correctly(model, cache)
    assert len(searches) == 3


def register_first(model, **others):
    """Register modules before those of the model, so that a search meets them first."""
    model._modules = {**others, **model._modules}


REGISTERED_TWICE = {
    "in two lists": lambda model: register_first(model, others=nn.ModuleList(model.blocks)),
    "in one list": lambda model: model.blocks.__setitem__(1, model.blocks[2]),
    "under another name": lambda model: register_first(model, other=model.blocks[2]),
    "under another name with the same ending": lambda model: register_first(
        model, subblocks=nn.ModuleDict({"2": model.blocks[2]})
    ),
}


@since_torch(2, 6)
@pytest.mark.parametrize("arrange", REGISTERED_TWICE.values(), ids=REGISTERED_TWICE)
@pytest.mark.parametrize("name", [2, "blocks.2"])
def test_a_module_registered_twice_is_captured_at_the_requested_place_after_it_is_replaced(name, arrange):
    model, cache, x = Net(order=(0, 2)), Located(), torch.randn(2, 4)
    arrange(model)
    outer = DoublyWrapped(model)
    for _ in range(2):
        with record(outer, {"it": Request(name, blocks="blocks")}, located=cache) as seen:
            outer(x)
        torch.testing.assert_close(seen["it"], model.blocks[2](model.blocks[0](x)))
        model.blocks[2] = Counting()


def test_copies_of_the_cache_of_located_modules_start_empty_and_work(searches):
    model, cache = Net(), Located()
    assert_captured_correctly(model, cache)
    for twin in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        searches.clear()
        for _ in range(2):
            assert_captured_correctly(model, twin)
        assert len(searches) == 3
    searches.clear()
    assert_captured_correctly(model, cache)
    assert searches == []


def test_a_model_in_the_cache_is_freed_without_the_garbage_collector():
    model, cache = Net(), Located()
    assert_captured_correctly(model, cache)
    dead = [weakref.ref(model), weakref.ref(model.blocks[0]), weakref.ref(model.blocks)]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in dead] == [None] * 3
    finally:
        gc.enable()
    assert len(cache._lists) == len(cache._modules) == 0


# Copies of a hooked model


def copies(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]


def test_a_model_can_be_copied_and_pickled_inside_and_after_a_capture_and_the_copy_is_independent():
    model, x = Net(), torch.randn(2, 4)
    with kdloss.capture(model, [0, 1], stop=True) as seen:
        twins = copies(model)
        for twin in twins:
            assert torch.equal(twin(x), twin.head(by_hand(twin, x, 3))), "nothing ends its pass"
        assert list(seen) == []
        model(x)
    assert_all_close([seen[0], seen[1]], [by_hand(model, x, 1), by_hand(model, x, 2)])
    twins += copies(model)
    for twin in twins:
        with torch.no_grad():
            twin.blocks[0].linear.weight.zero_()
        with kdloss.capture(twin, [0]) as features:
            twin(x)
        assert torch.equal(features[0], by_hand(twin, x, 1))
    assert all(hooks(twin) == 0 for twin in twins[3:])
    assert torch.equal(seen[0], by_hand(model, x, 1))


def test_a_pickle_made_inside_a_capture_needs_no_kdloss():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with kdloss.capture(model, ["0"]):
        data = pickle.dumps(model)
        model(torch.ones(1, 4))
    assert b"kdloss" not in data


def test_a_state_dict_taken_inside_a_capture_has_the_keys_of_a_model_without_hooks():
    model = Net()
    with kdloss.capture(model, [0]):
        assert list(model.state_dict()) == list(Net().state_dict())
        model(torch.ones(1, 4))


# Exceptions and memory


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("where", ["in the model", "in the with"])
def test_hooks_and_features_are_removed_after_an_exception_or_an_interrupt(error, where):
    model, x, captures = Net(), torch.ones(1, 4), []
    if where == "in the model":
        model.head = Raising(error)
    with pytest.raises(type(error)) as raised, kdloss.capture(model, [0, 1]) as seen:  # noqa: PT012
        captures.append(seen)
        model(x)
        raise error
    assert raised.value is error
    assert hooks(model) == 0
    assert (dict(captures[0]), captures[0].output) == ({}, None)
    model.head = nn.Linear(4, 2)
    with kdloss.capture(model, [0]) as seen:
        model(x)
    assert torch.equal(seen[0], by_hand(model, x, 1))


def test_features_of_a_refused_pass_are_removed():
    model, x, _ = net_reusing_block_0()
    with pytest.raises(RuntimeError, match="more than once"), kdloss.capture(model, [2, 0]) as seen:
        model(x)
    assert dict(seen) == {}
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match="changed in place"), kdloss.capture(model, ["0"]) as seen:
        model(x)
    assert (dict(seen), seen.output) == ({}, None)


def test_the_hooks_of_an_abandoned_capture_are_removed():
    model = Net()
    abandoned = kdloss.capture(model, [0])
    abandoned.__enter__()
    assert hooks(model) == 3
    del abandoned
    assert hooks(model) == 0


class Watched(Net):
    """A `Net` that keeps weak references to the outputs of its blocks."""

    outputs = ()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            self.outputs += (weakref.ref(x),)
        return self.head(x)


@pytest.mark.parametrize("end", ["complete", "stop", "error", "refused"])
def test_features_are_freed_after_the_step_without_the_garbage_collector(end):
    model, x = Watched(), torch.randn(2, 4)

    def step():
        with torch.no_grad(), kdloss.capture(model, [0, 1], stop=end == "stop") as seen:
            if end == "refused":
                model(x)
            model(x)
            if end == "error":
                raise ValueError
        assert [output() is not None for output in model.outputs] == ([True] if end == "stop" else [True, True, False])
        return seen[0].sum() + seen[1].sum()

    gc.collect()
    gc.disable()
    try:
        if end in ("error", "refused"):
            with suppress(ValueError, RuntimeError):
                step()
                pytest.fail("nothing was raised")
        else:
            step()
        assert len(model.outputs) == (1 if end == "stop" else 3)
        assert not any(output() is not None for output in model.outputs)
    finally:
        gc.enable()


# Nested captures and threads


def test_nested_captures_have_separate_records():
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


class CapturesStudent(nn.Module):
    """A teacher that runs and captures a student inside its forward."""

    def __init__(self, student):
        super().__init__()
        self.first, self.last, self.student, self.seen = Block(), Block(), student, []

    def forward(self, x):
        x = self.first(x)
        with kdloss.capture(self.student, [0, 1], stop=True) as seen:
            self.student(x)
        self.seen.append(seen)
        return self.last(x + seen[1])


def test_a_student_captured_within_a_captured_teacher_has_a_separate_record():
    student, x = Net(), torch.randn(2, 4)
    teacher = CapturesStudent(student)
    with kdloss.capture(teacher, ["first", "last", "student.blocks.0"]) as seen:
        out = teacher(x)
    first = teacher.first(x)
    inner = teacher.seen[0]
    assert torch.equal(seen["first"], first)
    assert torch.equal(seen["last"], out)
    assert seen["student.blocks.0"] is inner[0]
    assert_all_close([inner[0], inner[1]], [by_hand(student, first, 1), by_hand(student, first, 2)])


def in_threads(work, *arguments):
    errors = []

    def guarded(argument):
        try:
            work(argument)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(argument,)) for argument in arguments]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return errors


@pytest.mark.parametrize("stop", [False, True])
def test_each_thread_records_its_own_pass_of_one_model(stop):
    model, results = Net(), {}
    inside = threading.Barrier(2, timeout=10)

    def work(value):
        with kdloss.capture(model, [0], stop=stop) as seen:
            inside.wait()
            model(torch.full((1, 4), value))
            if not stop:
                inside.wait()
        results[value] = seen[0]

    assert in_threads(work, 1.0, 2.0) == []
    for value in (1.0, 2.0):
        assert torch.equal(results[value], by_hand(model, torch.full((1, 4), value), 1))
    assert hooks(model) == 0


def test_passes_of_other_threads_are_neither_recorded_nor_stopped():
    model, x = Net(), torch.randn(2, 4)
    with kdloss.capture(model, [0], stop=True) as seen:
        assert in_threads(lambda value: model(torch.full((1, 4), value)), 1.0, 2.0) == []
        assert list(seen) == []
        model(x)
    assert torch.equal(seen[0], by_hand(model, x, 1))
    assert model.blocks[2].runs == 2


def test_replicas_of_data_parallel_in_threads_are_refused():
    model, x = Net(), torch.randn(2, 4)
    replicated = kdloss.capture(model, [0])
    replicated.__enter__()
    replicas = [replica(model) for _ in (1, 2)]
    assert in_threads(lambda one: one(x), *replicas) == []
    with pytest.raises(RuntimeError, match=r"other threads only, as under nn\.DataParallel.*Distributed"):
        replicated.__exit__(None, None, None)
    assert hooks(model) == 0


def replica(module):
    """Copy a module as nn.DataParallel does for another device; the copy shares the hooks of the original."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        setattr(twin, name, parameter)
    return twin


# Several processes


@since_torch(2, 6)
def test_under_ddp_and_fsdp_gradients_match_one_process_and_teachers_still_work_after_a_stopped_pass(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(capture_processes.__file__)
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    student, teacher, x = capture_processes.data()
    s, t = (model.embed(x) for model in (student, teacher))
    features = [(by_hand(student, s, i), by_hand(teacher, t, i + 1).detach()) for i in (1, 3)]
    loss = sum((a - b).square().mean() for a, b in features) + student.head(features[1][0]).square().mean()
    output = teacher.head(by_hand(teacher, t, 5))
    expected = {
        "student": gradients(loss, student),
        "teacher": gradients(output.square().mean(), teacher),
        "part": gradients(by_hand(teacher, t, 2).square().mean(), teacher),
    }
    expected_part = gradients(by_hand(student, s, 2).square().mean(), student)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert_all_close(results["part"], expected_part, rtol=1e-10, atol=1e-12)
        for case, (_, wrap) in capture_processes.CASES.items():
            ours = results[case]
            for step in (0, 1):
                assert_all_close(ours["student"][step], expected["student"], rtol=1e-10, atol=1e-12)
            assert_all_close(ours["teacher"], expected["teacher"], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(ours["output"], output.detach(), rtol=1e-10, atol=1e-12)
            sharded = wrap is capture_processes.shard
            assert ours["in shards"] == sharded
            if sharded:
                assert_all_close(ours["part"], expected["part"], rtol=1e-10, atol=1e-12)
