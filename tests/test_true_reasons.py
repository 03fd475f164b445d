"""Error messages give the true reason and remedy for traced, frozen, wrapped and unprepared models."""

import functools

import pytest
import torch
from families import ResidualBlock
from torch import fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.utils.checkpoint import checkpoint

import kdloss
from kdloss import distances


class Net(nn.Module):
    """A net of three blocks; its forward calls each block through `run`."""

    def __init__(self, width=4, run=lambda block, x: block(x)):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3))
        self.head, self.run = nn.Linear(width, 3), run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


def reason(model, name, x, error=RuntimeError):
    """The error message when `capture` is asked for a module of this name."""
    with pytest.raises(error) as raised, kdloss.capture(model, [name]):
        model(x)
    return str(raised.value)


def under_no_grad(block, x):
    with torch.no_grad():
        return block(x)


X = torch.randn(2, 4)


# -- torch.fx ----------------------------------------------------------------------------------------


def test_the_error_for_a_traced_model_names_the_modules_that_its_graph_calls():
    traced = fx.symbolic_trace(Net())
    message = reason(traced, "blocks.1", X)
    assert "torch.fx" in message
    assert "{'blocks.1': ['blocks.1.0', 'blocks.1.1']}" in message
    assert "torch.compile" not in message
    with kdloss.capture(traced, ["blocks.1.1"]) as seen:
        traced(X)
    torch.testing.assert_close(seen["blocks.1.1"], Net.forward(traced_part(traced, 2), X))


def traced_part(traced, depth):
    """A net of the first blocks of a traced net, without a head."""
    part = Net()
    part.blocks = nn.ModuleList(nn.Sequential(*traced.get_submodule(f"blocks.{i}").children()) for i in range(depth))
    part.head = nn.Identity()
    return part


def test_the_error_for_a_traced_submodule_gives_paths_in_the_full_model():
    model = nn.Sequential(fx.symbolic_trace(Net()), nn.ReLU())
    assert "{'0.blocks.2': ['0.blocks.2.0', '0.blocks.2.1']}" in reason(model, "0.blocks.2", X)


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization is deprecated", "ignore:.*reduce_range", "ignore:.*observer"
)
def test_the_error_for_a_student_prepared_for_quantisation_names_what_its_graph_calls():
    block = nn.Sequential(ResidualBlock(3, 4, 1), ResidualBlock(4, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    student = prepare_qat_fx(block.train(), get_default_qat_qconfig_mapping(), (x,))
    message = reason(student, "1", x)
    assert "{'1': ['1.conv1', '1.conv2', '1.downsample.0']}" in message
    assert "shortcut" in message


def test_find_blocks_in_a_traced_model_raises_an_error_with_the_layers_to_write():
    traced = fx.symbolic_trace(Net())
    with pytest.raises(ValueError, match=r"torch\.fx.*layers=\['blocks\.\d\.\d', .*\]"):
        kdloss.layers.find_blocks(traced)


# -- modules that are never called -------------------------------------------------------------------


def test_the_error_for_a_module_of_which_only_the_weights_are_used_says_so():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    message = reason(Attending(), "attention.out_proj", X)
    assert "nn.MultiheadAttention computes with the weights of its parts" in message


def test_the_error_for_a_model_that_was_not_called_says_so():
    model = Net()
    with (
        pytest.raises(RuntimeError, match=r"nor did the Net that `capture` was given: call it there"),
        kdloss.capture(model, ["blocks.1"]),
    ):
        model.head(X)


# -- no gradient -------------------------------------------------------------------------------------


def test_the_error_for_a_backbone_under_no_grad_says_to_freeze_its_parameters():
    message = reason(Net(run=under_no_grad), "blocks.1", X)
    assert "ran under torch.no_grad()" in message
    assert "requires_grad_(False)" in message
    model = Net(run=under_no_grad)
    model.blocks.requires_grad_(False)  # the remedy
    with kdloss.capture(model, ["blocks.1"]) as seen:
        model(X)
    assert not seen["blocks.1"].requires_grad


def test_the_error_for_reentrant_checkpointing_differs_from_that_for_no_grad():
    def checkpointed(block, x):
        return checkpoint(block, x, use_reentrant=True)

    message = reason(Net(run=checkpointed), "blocks.1.0", X.clone().requires_grad_())
    assert "use_reentrant=False" in message
    assert "no_grad" not in message
    with_no_grad = reason(
        Net(run=lambda block, x: under_no_grad(functools.partial(checkpoint, block, use_reentrant=False), x)), 1, X
    )
    assert "ran under torch.no_grad()" in with_no_grad


def test_the_error_for_a_module_that_detaches_its_output_says_so():
    class Detaching(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    message = reason(nn.Sequential(Detaching(4, 4), nn.Linear(4, 2)), "0", X)
    assert "its own forward detaches it" in message
    assert "checkpointing" not in message


# -- a mask and **kwargs -----------------------------------------------------------------------------


def test_a_mask_reaches_a_distance_inside_a_function_of_kwargs():
    student, teacher = torch.randn(2, 1, 6, 5)
    mask = torch.tensor([[True, True, False, True, False, True]])

    def wrapped(s, t, **options):
        return 2 * distances.similarity(s, t, **options)

    plain = kdloss.masked(distances.similarity, student, teacher, mask)
    torch.testing.assert_close(kdloss.masked(wrapped, student, teacher, mask), 2 * plain)
    dirty = student.masked_fill(~mask.unsqueeze(-1), 1e3)
    torch.testing.assert_close(kdloss.masked(wrapped, dirty, teacher, mask), 2 * plain)
    within = kdloss.masked(distances.between_tokens(wrapped), student, teacher, mask)
    torch.testing.assert_close(
        within, 2 * kdloss.masked(distances.between_tokens(distances.similarity), student, teacher, mask)
    )
    cut = kdloss.masked(distances.similarity, student[mask][None], teacher[mask][None])
    torch.testing.assert_close(plain, cut)


def test_the_error_for_a_function_of_kwargs_around_a_distance_without_mask_says_to_name_its_parameters():
    student, teacher, mask = torch.randn(1, 6, 5), torch.randn(1, 6, 5), torch.tensor([[True] * 4 + [False] * 2])

    def wrapped(s, t, **options):
        return 2 * distances.mse(s, t, **options)

    for loss in (wrapped, kdloss.FeatureKD([0], pairing="same", distance=wrapped, alpha=0.0, depths=(1, 1))):
        with pytest.raises(
            TypeError, match=r"wrapped takes \*\*kwargs.*mse.*functools\.wraps.*def wrapped\(student, teacher"
        ):
            masked(loss, student, teacher, mask)
    named = functools.wraps(distances.mse)(lambda s, t, **options: wrapped(s, t, **options))
    expected = 2 * (student - teacher)[mask].square().mean()
    torch.testing.assert_close(masked(named, student, teacher, mask), expected)
    torch.testing.assert_close(kdloss.masked(wrapped, student, teacher), 2 * (student - teacher).square().mean())


def masked(loss, student, teacher, mask):
    """The masked loss of a distance, or of a criterion with one pair of layers."""
    if not isinstance(loss, nn.Module):
        return kdloss.masked(loss, student, teacher, mask)
    outputs = [type("Output", (), {"hidden_states": (x, x)})() for x in (student, teacher)]
    return loss(*outputs, mask=mask)


# -- a checkpoint of parameters that do not exist yet ------------------------------------------------


def test_the_error_for_loading_parameters_that_do_not_exist_yet_says_to_prepare():
    build = functools.partial(kdloss.FeatureKD, "last", alpha=0.0)
    state = build(depths=(3, 3), widths=(4, 5)).state_dict()
    assert next(iter(state)).startswith("terms.feature.projections.")
    with pytest.raises(
        RuntimeError, match=r"'terms\.feature\.projections.*write distill\.prepare\(student, \*\*batch\)"
    ):
        build().load_state_dict(state)
    build().load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(depths=(3, 3), widths=(4, 6)).load_state_dict(state)
