"""Teachers in TorchScript, exported programs, sessions that return numpy arrays, and functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdloss

pytestmark = pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning")


class Net(nn.Module):
    def __init__(self, width, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.drop, self.head = nn.Conv2d(3, width, 3, 2), nn.Dropout(0.5), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.drop(self.conv(x).relu()).mean((2, 3)))


class Session:
    """Like a session of onnxruntime: takes names of outputs, returns a list of numpy arrays."""

    def __init__(self, net):
        self.net = net

    def run(self, names, feed):
        return [self.net(torch.from_numpy(feed["x"])).detach().numpy()]


def images():
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def saved(module, tmp_path):
    torch.jit.script(module).save(tmp_path / "net.pt")
    return torch.jit.load(tmp_path / "net.pt")


KINDS = {
    "scripted": lambda net, folder: torch.jit.script(net),
    "scripted in train mode": lambda net, folder: torch.jit.script(net).train(),
    "traced": lambda net, folder: torch.jit.trace(net, images()),
    "loaded": saved,
    "frozen": lambda net, folder: torch.jit.freeze(torch.jit.script(net)),
    "exported": lambda net, folder: torch.export.export(net, (images(),)).module(),
    "inside a module": lambda net, folder: nn.Sequential(nn.Identity(), torch.jit.script(net)),
    "exported inside a module": lambda net, folder: nn.Sequential(torch.export.export(net, (images(),)).module()),
    "function": lambda net, folder: lambda x: net(x),
    "numpy": lambda net, folder: lambda x: net(x).numpy(),
    "numpy in a dict": lambda net, folder: lambda x: {"logits": net(x).numpy()},
    "session": lambda net, folder: lambda x: Session(net).run(None, {"x": x.numpy()})[0],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_teacher_gives_the_loss_of_the_plain_model_and_keeps_its_mode(kind, tmp_path):
    student, net, x, y = Net(4).eval(), Net(8, seed=1).eval(), images(), torch.tensor([0, 1, 2, 3])
    teacher = KINDS[kind](net, tmp_path)
    modes = [m.training for m in teacher.modules() if hasattr(m, "training")] if isinstance(teacher, nn.Module) else []
    s, t = student(x), net(x).detach()
    kl = 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")
    expected = 0.5 * F.cross_entropy(s, y) + 0.5 * kl
    loss = kdloss.Distiller(teacher, kdloss.VanillaKD())(student, x, labels=y).loss
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(v, list(student.parameters())) for v in (loss, expected)]
    torch.testing.assert_close(*gradients)
    if modes:
        assert modes == [m.training for m in teacher.modules() if hasattr(m, "training")]


def test_keyword_inputs_are_passed_to_such_teachers_by_name():
    student, net, x = Net(4).eval(), Net(8, seed=1).eval(), images()
    for teacher in (torch.jit.script(net), torch.jit.trace(net, x), lambda x: net(x).numpy()):
        out = kdloss.Distiller(teacher, kdloss.VanillaKD(1.0, 0.0))(student, x=x)
        expected = F.kl_div(student(x).log_softmax(-1), net(x).softmax(-1), reduction="batchmean")
        torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen"])
def test_torchscript_has_no_features_and_the_error_says_what_to_do(kind, tmp_path):
    teacher = KINDS[kind](Net(4).eval(), tmp_path)
    with (
        pytest.raises(TypeError, match=r"TorchScript .* has none: its outputs can be learned"),
        kdloss.capture(teacher, ["conv"]),
    ):
        pass
    enclosing = nn.Sequential(Net(4), torch.jit.script(Net(4)))
    with pytest.raises(TypeError, match="TorchScript"), kdloss.capture(enclosing, ["1"]):
        pass
    recommended = nn.Sequential(teacher, nn.Identity())  # what the error recommends
    with kdloss.capture(recommended, ["1"]) as seen:
        recommended(images())
    assert seen["1"].shape == (4, 5)


def test_a_function_is_refused_as_a_teacher_of_features():
    with pytest.raises(TypeError, match="a function, which has outputs only"):
        kdloss.Distiller(lambda x: x, kdloss.FeatureKD())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # raised inside torch by run_decompositions
@pytest.mark.parametrize("make", ["trace", "export", "decompose"])
def test_a_graph_made_in_training_mode_is_refused(make):
    x = images()
    for layer in (nn.Dropout(0.3), nn.BatchNorm2d(3), nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(49, 7))):
        example = x[..., :7, :7]

        def graph(module, example=example):
            if make == "trace":
                return torch.jit.trace(module, example, check_trace=False)
            program = torch.export.export(module, (example,))
            return (program if make == "export" else program.run_decompositions()).module()

        kdloss.Teacher(graph(layer.eval()))
        with pytest.raises(ValueError, match=r"graph was made in training mode .* make it from model\.eval"):
            kdloss.Teacher(graph(layer.train()))


def test_an_exported_program_is_refused_and_the_message_names_its_module():
    with pytest.raises(TypeError, match=r"write teacher\.module\(\)"):
        kdloss.Distiller(torch.export.export(Net(4).eval(), (images(),)), kdloss.VanillaKD())
