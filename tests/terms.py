"""The table of terms: how each is made, and its values at the valid positions in plain torch."""

from types import SimpleNamespace as Output

import torch
import torch.nn.functional as F

from kdloss import CrossEntropy, Features, Logits, Task, distances, divergences
from kdloss.terms import Term

MASK = torch.tensor([[True, True, False, True], [True, False, True, True], [True, True, True, False]])


class Batch:
    """Outputs of student (two blocks) and teacher (three), labels with one ignored, and a mask."""

    def __init__(self, causal=False, seed=0, positions=(3, 4), classes=7, width=5):
        draw = torch.Generator().manual_seed(seed)

        def random(*shape):
            return (2 * torch.randn(*shape, generator=draw)).double()

        self.logits = random(*positions, classes).requires_grad_()
        self.hidden = [random(*positions, width).requires_grad_() for _ in range(3)]
        self.student = Output(logits=self.logits, hidden_states=self.hidden, causal=causal)
        states = [random(*positions, width) for _ in range(4)]
        self.teacher = Output(logits=random(*positions, classes), hidden_states=states)
        self.labels = torch.randint(0, classes, positions, generator=draw)
        self.labels[0, 0] = -100
        self.mask, self.causal = MASK, causal

    @property
    def inputs(self):
        """The tensors whose gradients are compared."""
        return [self.logits, *self.hidden[1:]]

    def args(self):
        """The arguments with which a criterion is called."""
        return self.student, self.teacher, self.labels


def grad(value, inputs):
    """Return gradients, with zeros for inputs that the value does not depend on."""
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def close(value, expected, batch, rtol=1e-11, atol=1e-13):
    """Assert equal values, and equal gradients with respect to everything that the student returned."""
    torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
    torch.testing.assert_close(grad(value, batch.inputs), grad(expected, batch.inputs), rtol=rtol, atol=atol)


def kl(student, teacher, temperature):
    """T² KL(teacher || student) at every position."""
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


class Confidence(Term):
    """A custom term: the sum of squared probabilities."""

    def loss(self, step):
        return step.where.take(step.student_logits()).softmax(-1).square().sum(-1)


def size(output, labels):
    """A custom loss that leaves out the last position of a causal model, which has no label."""
    values = output.logits.square().mean(-1)
    return values[:, :-1] if output.causal else values


def smoothed(labels):
    """Spread a fifth of each label over all seven classes, and weight class c by c + 1."""
    return torch.arange(1, 8) * (0.8 * F.one_hot(labels, 7).double() + 0.2 / 7)


# Arguments at the valid positions: logits of student s and teacher t, features of their blocks h and k, labels y.
TERMS = {
    "ce": (CrossEntropy, lambda s, t, h, k, y: F.cross_entropy(s, y, reduction="none")),
    "smooth": (
        lambda **o: CrossEntropy(label_smoothing=0.2, class_weights=torch.arange(1, 8).double(), **o),
        lambda s, t, h, k, y: -(smoothed(y) * s.log_softmax(-1)).sum(-1),
    ),
    "kd": (lambda **o: Logits(temperature=2.0, **o), lambda s, t, h, k, y: kl(s, t, 2.0)),
    "reverse": (
        lambda **o: Logits(divergences.reverse_kl, temperature=3.0, **o),
        lambda s, t, h, k, y: kl(t, s, 3.0),
    ),
    "logits": (lambda **o: Logits(divergences.logit_mse, **o), lambda s, t, h, k, y: (s - t).square().mean(-1)),
    "last": (lambda **o: Features("last", **o), lambda s, t, h, k, y: (h[1] - k[2]).square().mean(-1)),
    "first": (
        lambda **o: Features(pairing=[(0, 1)], distance=distances.cosine, **o),
        lambda s, t, h, k, y: 1 - F.cosine_similarity(h[0], k[1], -1),
    ),
    "task": (lambda **o: Task(size, **o), lambda s, t, h, k, y: s.square().mean(-1)),
    "own": (Confidence, lambda s, t, h, k, y: s.softmax(-1).square().sum(-1)),
}


def made(name, **options):
    """Make a term of the table, with its name there."""
    return TERMS[name][0](name=name, **options)


def by_hand(name, batch, mask=None, *, by_mask=False):
    """Compute a term's values at the valid positions in plain torch."""
    s, t, y = batch.logits, batch.teacher.logits, batch.labels
    h, k = batch.hidden[1:], batch.teacher.hidden_states[1:]
    if batch.causal:
        (s, t), y, mask = (x[:, :-1] for x in (s, t)), y[:, 1:], None if mask is None else mask[:, 1:]
        h, k = ([x[:, :-1] for x in many] for many in (h, k))
    keep = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
    keep = keep if by_mask else keep & (y != -100)
    return TERMS[name][1](s[keep], t[keep], [x[keep] for x in h], [x[keep] for x in k], y[keep])
