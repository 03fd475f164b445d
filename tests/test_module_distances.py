"""Distances with parameters or a memory: VID, MGD, CRD."""

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from losses import sample
from torch import nn

import kdloss
from kdloss.distances._rows import needs_no_width

BUILD = {
    "VID": partial(kdloss.distances.VID, 6, 6),
    "MGD": partial(kdloss.distances.MGD, 6, 6, size=(2, -1)),
    "CRD": partial(kdloss.distances.CRD, 6, 6, width=5, negatives=7, temperature=0.5),
}
every_module = pytest.mark.parametrize("name", BUILD)


def features(rows=8, dtype=torch.float64):
    return sample(rows, 6, dtype=dtype)


def state(module):
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


@every_module
def test_gradients_of_the_parameters_are_those_of_the_oracle(name):
    """The expected gradients are complex steps through the oracle, for every entry of every parameter."""
    module = BUILD[name]().double().eval()
    student, teacher = features()
    module(student, teacher).sum().backward()
    s, t, parameters = student.detach().numpy(), teacher.numpy(), state(module)
    oracle, options = getattr(oracles, name.lower()), BUILD[name].keywords
    for key, parameter in module.named_parameters():
        exact = oracles.gradient(lambda x, key=key: oracle(s, t, {**parameters, key: x}, **options), parameters[key])
        np.testing.assert_allclose(parameter.grad, exact, rtol=1e-9, atol=1e-10 * abs(exact).max())
        assert abs(exact).max() > 1e-3


@every_module
def test_gradcheck_passes_for_features_and_parameters(name):
    module = BUILD[name]().double().eval()
    student, teacher = features()
    names, values = zip(*module.named_parameters(), strict=True)

    def call(student, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, state, (student, teacher))

    assert torch.autograd.gradcheck(call, (student, *values))
    assert torch.autograd.gradgradcheck(call, (student, *values))


@every_module
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_masked_positions_change_no_parameter_gradient_and_no_memory(name, garbage):
    student, teacher = (x.detach() for x in features(dtype=torch.float32))
    mask = torch.tensor([True, True, False, True, False, False, True, True])
    results = []
    for fill in (0.0, garbage):
        torch.manual_seed(3)
        module = BUILD[name]().train()
        s, t = (x.masked_fill(~mask.unsqueeze(-1), fill) for x in (student, teacher))
        s.requires_grad_()
        kdloss.masked(module, s, t, mask).backward()
        assert not s.grad[~mask].any()
        results.append([s.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@every_module
def test_deepcopy_pickle_and_state_dict_restore_the_same_module(name):
    student, teacher = features(dtype=torch.float32)
    module = BUILD[name]()
    module(student, teacher).sum().backward()
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    loaded = BUILD[name]()
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    twins = [copy.deepcopy(module) for _ in others]
    for other, module in zip(others, twins, strict=True):
        assert [key for key, _ in other.named_buffers()] == [key for key, _ in module.named_buffers()]
        for mode in (other.eval(), other.train()):
            results = []
            for which in (mode, module.train(mode.training)):
                torch.manual_seed(5)
                results.append(which(student, teacher))
            assert torch.equal(*results)
        for a, b in zip(other.buffers(), module.buffers(), strict=True):
            assert torch.equal(a, b)


@every_module
def test_a_short_training_lowers_the_loss(name):
    torch.manual_seed(0)
    module, student = BUILD[name](), nn.Linear(6, 6)
    inputs = torch.randn(5, 24, 6)
    with torch.no_grad():
        teacher = torch.tanh(inputs.flip(-1) * 2)
    optimizer = torch.optim.Adam([*student.parameters(), *module.parameters()], lr=0.02)
    losses = []
    for step in range(100):
        loss = kdloss.masked(module, student(inputs[step % 5]), teacher[step % 5])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() for p in student.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_features_and_modules_of_16_bits_are_computed_in_float32(name, dtype):
    student, teacher = features(dtype=dtype)
    module = BUILD[name]().to(dtype).eval()
    value = module(student, teacher)
    assert value.dtype == torch.float32
    value.sum().backward()
    wide = copy.deepcopy(module).double()
    wide.zero_grad()
    twin = student.detach().double().requires_grad_()
    exact = wide(twin, teacher.double())
    exact.sum().backward()
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
    eps = torch.finfo(dtype).eps
    pairs = [(student, twin), *zip(module.parameters(), wide.parameters(), strict=True)]
    for rounded, full in pairs:
        assert rounded.grad.dtype == dtype
        torch.testing.assert_close(rounded.grad.double(), full.grad, rtol=eps, atol=1e-4 * full.grad.abs().max().item())


@every_module
def test_modules_in_training_mode_compile_without_a_graph_break(name):
    student, teacher = features(dtype=torch.float32)
    mask = torch.arange(8) != 2
    torch._dynamo.reset()
    plain = BUILD[name]().train()
    twin = copy.deepcopy(plain)
    compiled = torch.compile(lambda s, t, m: kdloss.masked(twin, s, t, m), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for call in (partial(kdloss.masked, plain), compiled):
            torch.manual_seed(5)
            results.append(call(student, teacher, mask))
        torch.testing.assert_close(*results)
    for a, b in zip(plain.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    slopes = [torch.autograd.grad(x, student)[0] for x in results]
    torch.testing.assert_close(*slopes)


def test_only_crd_takes_features_of_different_widths():
    assert needs_no_width(partial(kdloss.distances.CRD, negatives=8))
    assert needs_no_width(BUILD["CRD"]())
    assert kdloss.distances.CRD(6, 9, width=4, negatives=8)(torch.randn(3, 6), torch.randn(3, 9)).shape == (3,)
    for module in (kdloss.distances.VID, kdloss.distances.MGD):
        assert not needs_no_width(module)
        with pytest.raises(ValueError, match=rf"6 \(student\) and 9 .* kdloss\.distances\.{module.__name__}\(9, 9\)"):
            module(6, 9)


# -- VID --


def test_vid_is_a_gaussian_negative_log_likelihood_and_its_trained_variance_is_the_mean_squared_gap():
    gap = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    module = kdloss.distances.VID(2, 2)
    expected = 0.5 * ((1 + 9) / 5 / 2 + math.log(5)), 0.5 * ((4 + 1) / 5 / 2 + math.log(5))
    torch.testing.assert_close(module(gap, torch.zeros(2, 2)), torch.tensor(expected))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        module(gap, torch.zeros(2, 2)).mean().backward()
        optimizer.step()
    variance = nn.functional.softplus(module.alpha) + 1e-5
    torch.testing.assert_close(variance, torch.tensor([2.5, 5.0]), rtol=1e-3, atol=0)
    likelihood = torch.distributions.Normal(torch.zeros(2), variance.sqrt()).log_prob(gap).mean(-1)
    expected = -likelihood - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(module(gap, torch.zeros(2, 2)), expected)


def test_vid_may_be_negative_and_refuses_a_variance_below_eps():
    module = kdloss.distances.VID(3, 3, variance=0.1)
    torch.testing.assert_close(module(torch.ones(3), torch.ones(3)), torch.tensor(math.log(0.1) / 2))
    wide = kdloss.distances.VID(3, 3, variance=1000.0)
    torch.testing.assert_close(wide(torch.ones(3), torch.ones(3)), torch.tensor(math.log(1000) / 2))
    with pytest.raises(ValueError, match="variance"):
        kdloss.distances.VID(3, 3, variance=0.0)


# -- MGD --


def with_identity(module):
    """Make both convolutions return their input pixel."""
    for layer in (module.first, module.second):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    return module


def test_mgd_sets_all_channels_of_random_positions_of_the_student_to_zero_in_training_only():
    module = with_identity(kdloss.distances.MGD(4, 4, ratio=0.25, size=(1, -1)))
    student, teacher = torch.full((10, 400, 4), 3.0), torch.full((10, 400, 4), 1.0)
    assert (module.eval()(student, teacher) == 4).all()
    torch.manual_seed(0)
    value = module.train()(student, teacher)
    assert set(value.unique().tolist()) == {1.0, 4.0}  # (0 - 1)^2 and (3 - 1)^2, the same in all channels
    hidden = (value == 1).float().mean().item()
    assert hidden == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    torch.manual_seed(0)
    assert torch.equal(module(student, teacher), value)
    assert (with_identity(kdloss.distances.MGD(4, 4, ratio=1.0, size=(1, -1)))(student, teacher) == 1).all()


def test_mgd_generates_a_position_from_its_neighbours_on_the_grid():
    """The first convolution sums nine pixels; the sums on a map of 2 x 3 are computed by hand."""
    module = with_identity(kdloss.distances.MGD(1, 1, size=(2, 3))).eval()
    nn.init.ones_(module.first.weight)
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    made = module(values, torch.zeros(6, 1)).sqrt()
    torch.testing.assert_close(made, torch.tensor([12.0, 21.0, 16.0, 12.0, 21.0, 16.0]))
    tall = with_identity(kdloss.distances.MGD(1, 1, size=(-1, 2))).eval()  # rows (1, 2), (3, 4), (5, 6)
    nn.init.ones_(tall.first.weight)
    torch.testing.assert_close(
        tall(values, torch.zeros(6, 1)).sqrt(), torch.tensor([10.0, 10.0, 21.0, 21.0, 18.0, 18.0])
    )


def test_mgd_of_the_tokens_of_a_map_equals_its_convolutions_on_the_map():
    maps, target = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    module = kdloss.distances.MGD(5, 5, size=(2, 8)).eval()
    made = module.second(module.first(maps).relu())
    expected = (made - target).square().mean(1).flatten(1)
    value = module(kdloss.distances.tokens(maps), kdloss.distances.tokens(target))
    torch.testing.assert_close(value, expected)
    assert module.ratio == 0.65
    module.size = None
    torch.testing.assert_close(
        module(kdloss.distances.tokens(maps), kdloss.distances.tokens(target), grid=(2, 8)), expected
    )


def test_mgd_with_a_mask_equals_mgd_of_the_cropped_map():
    """Both convolutions treat masked rows and columns like the padding around a map."""
    student, teacher = torch.randn(1, 4, 5, 3), torch.randn(1, 4, 5, 3)
    mask = torch.zeros(1, 4, 5).bool()
    mask[:, 1:3, 2:] = True
    module = kdloss.distances.MGD(3, 3, size=(4, 5)).eval()
    masked = module(student.flatten(1, 2), teacher.flatten(1, 2), mask=mask.flatten(1))
    module.size = (2, 3)
    cropped = module(student[:, 1:3, 2:].flatten(1, 2), teacher[:, 1:3, 2:].flatten(1, 2))
    torch.testing.assert_close(masked[mask.flatten(1)], cropped.flatten())


def test_mgd_refuses_positions_that_do_not_fit_a_grid():
    with pytest.raises(ValueError, match=r"9 positions, and their grid isn't given.*size=\(1, -1\)"):
        kdloss.distances.MGD(2, 2)(torch.zeros(9, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"6 positions, of a map \(3, 2\), which don't fit a grid of size=\(2, 3\)"):
        kdloss.distances.MGD(2, 2, size=(2, 3))(torch.zeros(6, 2), torch.zeros(6, 2), grid=(3, 2))
    for size in ((2, 2), (4, -1), (-1, -1), (0, 6)):
        with pytest.raises(ValueError, match=rf"6 positions.*size=\({size[0]}, {size[1]}\)"):
            kdloss.distances.MGD(2, 2, size=size)(torch.zeros(6, 2), torch.zeros(6, 2))
    with pytest.raises(ValueError, match="ratio"):
        kdloss.distances.MGD(2, 2, ratio=1.5)


# -- CRD --


def test_crd_with_two_negatives_equals_a_calculation_by_hand():
    """Unit vectors in the plane with known cosines; tau = 1/2, so that N z = 2 e."""
    module = kdloss.distances.CRD(2, 2, width=2, negatives=2, temperature=0.5).eval()
    for layer in (module.student, module.teacher):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    module.teachers.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    module.students.copy_(torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    value = module(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 7.0]]))
    bar = 2 * math.exp(1 / (2 * 2 * 0.25))

    def h(cosine):
        e = math.exp(cosine / 0.5)
        return e / (e + bar)

    positive = -2 * math.log(h(0.0))
    negatives = sum(-math.log(1 - h(c)) for c in (0.0, -1.0, 0.8, -1.0))
    torch.testing.assert_close(value, torch.tensor([positive + negatives]))


def test_the_constant_of_crd_is_the_mean_over_random_directions_that_the_authors_estimate():
    torch.manual_seed(0)
    memory = (torch.rand(200_000, 128) * 2 - 1) * math.sqrt(3 / 128)  # the initial memory in the authors' code
    anchor = nn.functional.normalize(torch.randn(128), dim=0)
    estimate = (memory @ anchor / 0.07).exp().mean().item()
    assert math.exp(1 / (2 * 128 * 0.07**2)) == pytest.approx(estimate, rel=0.02)


def test_crd_overwrites_the_oldest_rows_of_its_memory_with_the_counted_rows_in_order():
    torch.manual_seed(0)
    module = kdloss.distances.CRD(4, 4, width=3, negatives=5)
    teachers, place = module.teachers.clone(), 0
    students = module.students.clone()
    for step in range(6):
        student, teacher = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
        mask = torch.rand(2, 4) > (0.3, 0.7, 0.0, 2.0, 0.5, 0.3)[step]
        module(student, teacher, mask=mask).sum().backward()
        with torch.no_grad():
            new_s = nn.functional.normalize(module.student(student[mask]), dim=-1)
            new_t = nn.functional.normalize(module.teacher(teacher[mask]), dim=-1)
        for s, t in zip(new_s, new_t, strict=True):
            students[place], teachers[place] = s, t
            place = (place + 1) % 5
        torch.testing.assert_close(module.teachers, teachers)
        torch.testing.assert_close(module.students, students)
        assert module.next == place
    assert not module.teachers.requires_grad
    assert module.teachers.shape == (5, 3)


def test_crd_writes_no_place_of_its_memory_twice_in_one_call(monkeypatch):
    """On GPUs it is undefined which of two writes to the same place wins."""
    written, copy_to = [], torch.Tensor.index_copy_

    def spy(self, dim, index, source):
        written.append(index.tolist())
        return copy_to(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy_", spy)
    module = kdloss.distances.CRD(4, 4, width=3, negatives=5)
    module(torch.randn(12, 4), torch.randn(12, 4), mask=torch.arange(12) != 9)
    assert written == [[1, 2, 3, 4, 0]] * 4  # the last five of eleven rows: places 6 to 10, modulo 5


def test_crd_reads_its_memory_and_does_not_change_it_in_eval_mode():
    module = kdloss.distances.CRD(4, 4, width=3, negatives=5, temperature=0.5).eval()
    before = copy.deepcopy(module.state_dict())
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    value = module(student, teacher)
    assert all(torch.equal(before[key], x) for key, x in module.state_dict().items())
    module.teachers.copy_(-module.teachers)
    assert not torch.allclose(module(student, teacher), value)
    module.train()(student, teacher)
    assert module.next == 3


def test_a_resumed_run_of_crd_equals_an_uninterrupted_run():
    def run(module, optimizer, steps):
        losses = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            student, teacher = torch.randn(2, 4, 6, generator=generator)
            loss = module(student, teacher).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def made():
        module = BUILD["CRD"]()
        return module, torch.optim.Adam(module.parameters(), lr=0.01)

    first = made()
    run(*first, range(3))
    saved = copy.deepcopy([x.state_dict() for x in first])
    rest = run(*first, range(3, 6))
    second = made()
    for x, loaded in zip(second, saved, strict=True):
        x.load_state_dict(loaded)
    assert run(*second, range(3, 6)) == rest


def test_several_calls_of_crd_can_be_differentiated_together():
    """The memory changes in place between forward and backward."""
    module = BUILD["CRD"]()
    student, teacher = features(dtype=torch.float32)
    both = module(student, teacher).sum() + module(student, teacher).sum()
    assert torch.autograd.grad(both, student)[0].isfinite().all()


def test_crd_refuses_invalid_settings():
    for wrong in ({"negatives": 0}, {"width": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kdloss.distances.CRD(4, 4, **wrong)


@pytest.mark.parametrize("by", ["index", "labels"])
def test_a_repeated_row_or_class_is_no_negative_of_itself_in_crd(by):
    """Value and gradient equal a float64 calculation, over three steps in which rows or classes repeat."""
    module = kdloss.distances.CRD(3, 4, width=2, negatives=6, temperature=0.5).double()
    seen = [(s.clone(), t.clone(), -1) for s, t in zip(module.students, module.teachers, strict=True)]
    bar, place, left_out = 6 * math.exp(1 / (2 * 2 * 0.25)), 0, 0
    for identities in ([4, 7], [7, 5], [4, 7]):
        student = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(2, 4, dtype=torch.float64)
        value = module(student, teacher, **{by: torch.tensor(identities)})
        s = nn.functional.normalize(module.student(student), dim=-1)
        t = nn.functional.normalize(module.teacher(teacher), dim=-1)

        def h(a, b):
            return (a @ b / 0.5).exp() / ((a @ b / 0.5).exp() + bar)

        expected = []
        for row, number in enumerate(identities):
            others = [(a, b) for a, b, other in seen if other != number]
            left_out += 6 - len(others)
            far = sum((1 - h(s[row], b)).log() + (1 - h(t[row], a)).log() for a, b in others)
            expected.append(-2 * h(s[row], t[row]).log() - far)
        torch.testing.assert_close(value, torch.stack(expected))
        slopes = (torch.autograd.grad(x.sum(), student)[0] for x in (value, torch.stack(expected)))
        torch.testing.assert_close(*slopes)
        for a, b, number in zip(s.detach(), t.detach(), identities, strict=True):
            seen[place % 6], place = (a, b, number), place + 1
    assert left_out == 4


def test_a_row_without_a_class_has_all_remembered_rows_as_negatives_in_crd():
    module = kdloss.distances.CRD(3, 3, width=2, negatives=6).eval()
    student, teacher = torch.randn(2, 2, 3)
    plain = module(student, teacher)
    torch.testing.assert_close(module(student, teacher, labels=torch.tensor([-100, -1])), plain)


def test_crd_refuses_indices_that_are_not_one_integer_per_row():
    module = kdloss.distances.CRD(3, 3, negatives=6)
    for wrong in (torch.zeros(2), torch.tensor([1]), torch.tensor([[1, 2]])):
        with pytest.raises(ValueError, match=r"CRD's index is an integer for each of the rows \(2,\)"):
            module(torch.randn(2, 3), torch.randn(2, 3), index=wrong)
