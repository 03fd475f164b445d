"""Errors whose reasons and remedies hold for the model at hand: traced, frozen, wrapped, not prepared."""

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
    """Three blocks; `run` is how its forward calls one."""

    def __init__(self, width=4, run=lambda block, x: block(x)):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3))
        self.head, self.run = nn.Linear(width, 3), run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


def reason(model, name, x, error=RuntimeError):
    """What capture says of a module of this name, in one pass."""
    with pytest.raises(error) as raised, kdloss.capture(model, [name]):
        model(x)
    return str(raised.value)


def frozen(block, x):
    with torch.no_grad():
        return block(x)


X = torch.randn(2, 4)


# -- torch.fx ---------------------------------------------------------------------------------------


def test_of_a_traced_model_the_modules_that_its_graph_calls_are_named():
    traced = fx.symbolic_trace(Net())
    said = reason(traced, "blocks.1", X)
    assert "torch.fx" in said
    assert "{'blocks.1': ['blocks.1.0', 'blocks.1.1']}" in said
    assert "torch.compile" not in said
    with kdloss.capture(traced, ["blocks.1.1"]) as seen:
        traced(X)
    torch.testing.assert_close(seen["blocks.1.1"], Net.forward(traced_part(traced, 2), X))


def traced_part(traced, depth):
    """The first blocks of a traced net as a net of its own, without a head."""
    part = Net()
    part.blocks = nn.ModuleList(nn.Sequential(*traced.get_submodule(f"blocks.{i}").children()) for i in range(depth))
    part.head = nn.Identity()
    return part


def test_a_traced_part_of_a_model_has_its_names_in_the_whole():
    whole = nn.Sequential(fx.symbolic_trace(Net()), nn.ReLU())
    assert "{'0.blocks.2': ['0.blocks.2.0', '0.blocks.2.1']}" in reason(whole, "0.blocks.2", X)


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization is deprecated", "ignore:.*reduce_range", "ignore:.*observer"
)
def test_a_student_prepared_for_quantisation_is_told_what_its_graph_calls():
    block = nn.Sequential(ResidualBlock(3, 4, 1), ResidualBlock(4, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    student = prepare_qat_fx(block.train(), get_default_qat_qconfig_mapping(), (x,))
    said = reason(student, "1", x)
    assert "{'1': ['1.conv1', '1.conv2', '1.downsample.0']}" in said
    assert "shortcut" in said


def test_a_traced_model_has_no_lists_of_blocks_and_says_so():
    traced = fx.symbolic_trace(Net())
    with pytest.raises(ValueError, match=r"torch\.fx.*layers=\['blocks\.\d\.\d', .*\]"):
        kdloss.layers.find_blocks(traced)


# -- parts that are never called ---------------------------------------------------------------------


def test_parts_whose_weights_alone_are_used_are_told_from_skipped_ones():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    said = reason(Attending(), "attention.out_proj", X)
    assert "nn.MultiheadAttention computes with the weights of its parts" in said


def test_a_model_that_was_not_called_itself_is_told_so():
    model = Net()
    with (
        pytest.raises(RuntimeError, match=r"nor did the Net that `capture` was given: call it there"),
        kdloss.capture(model, ["blocks.1"]),
    ):
        model.head(X)


# -- no gradient -------------------------------------------------------------------------------------


def test_a_frozen_backbone_is_told_to_be_frozen_by_its_parameters():
    said = reason(Net(run=frozen), "blocks.1", X)
    assert "ran under torch.no_grad()" in said
    assert "requires_grad_(False)" in said
    model = Net(run=frozen)
    model.blocks.requires_grad_(False)  # the remedy
    with kdloss.capture(model, ["blocks.1"]) as seen:
        model(X)
    assert not seen["blocks.1"].requires_grad


def test_reentrant_checkpointing_is_told_from_a_frozen_backbone():
    def checkpointed(block, x):
        return checkpoint(block, x, use_reentrant=True)

    said = reason(Net(run=checkpointed), "blocks.1.0", X.clone().requires_grad_())
    assert "use_reentrant=False" in said
    assert "no_grad" not in said
    both = reason(Net(run=lambda block, x: frozen(functools.partial(checkpoint, block, use_reentrant=False), x)), 1, X)
    assert "ran under torch.no_grad()" in both


def test_a_module_that_detaches_its_own_output_is_told_so():
    class Detaching(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    said = reason(nn.Sequential(Detaching(4, 4), nn.Linear(4, 2)), "0", X)
    assert "its own forward detaches it" in said
    assert "checkpointing" not in said


# -- a mask and **kwargs -----------------------------------------------------------------------------


def test_a_mask_reaches_the_loss_inside_a_function_of_kwargs():
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


def test_one_whose_inner_loss_takes_no_mask_is_told_to_name_its_parameters():
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
    """A distance or a criterion of one pair, under a mask."""
    if not isinstance(loss, nn.Module):
        return kdloss.masked(loss, student, teacher, mask)
    outputs = [type("Output", (), {"hidden_states": (x, x)})() for x in (student, teacher)]
    return loss(*outputs, mask=mask)


# -- a checkpoint before its place is there ----------------------------------------------------------


def test_a_criterion_that_loads_what_it_has_no_place_for_is_told_to_prepare():
    made = functools.partial(kdloss.FeatureKD, "last", alpha=0.0)
    learned = made(depths=(3, 3), widths=(4, 5)).state_dict()
    assert next(iter(learned)).startswith("terms.feature.projections.")
    with pytest.raises(
        RuntimeError, match=r"'terms\.feature\.projections.*write distill\.prepare\(student, \*\*batch\)"
    ):
        made().load_state_dict(learned)
    made().load_state_dict(learned, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        made(depths=(3, 3), widths=(4, 6)).load_state_dict(learned)
