"""Record training steps: the module before each step, its output, and how often each module ran."""

import ast
import copy
import inspect
import textwrap
from collections import Counter

import torch
from families import VOCAB
from torch.nn.modules import module as hooks

import kdloss


class Steps:
    """Record every step that a `Distillation` takes inside the `with`.

    `before` has a copy of the module from before each step, `outs` the output of each step, and `ran` how often each
    module ran, except in the one pass that finds out how a student reads labels. `model` is the module itself.
    """

    def __enter__(self):
        self.before, self.outs, self.ran, self.model = [], [], Counter(), None
        self._own_loss, kdloss.distiller.own_loss = kdloss.distiller.own_loss, self._uncounted_own_loss
        self._handles = [hooks.register_module_forward_pre_hook(self._begin)]
        self._handles.append(hooks.register_module_forward_hook(self._end))
        return self

    def __exit__(self, *_):
        kdloss.distiller.own_loss = self._own_loss
        for handle in self._handles:
            handle.remove()

    def _uncounted_own_loss(self, *args):
        ran = self.ran.copy()
        loss = self._own_loss(*args)
        self.ran = ran
        return loss

    def _begin(self, module, args):
        self.ran[module] += 1
        if isinstance(module, kdloss.Distillation):
            self.model = module
            self.before.append(copy.deepcopy(module))

    def _end(self, module, args, output):
        if module is self.model:
            self.outs.append(output)


def recipe(function):
    """Mark a recipe for users: its criterion and training step may take at most eight lines of code."""
    lines = user_lines(function)
    assert len(lines) <= 8, f"{function.__name__} takes {len(lines)} lines:\n" + "\n".join(lines)
    return function


def user_lines(function):
    """The lines of code in a function's body."""
    source = textwrap.dedent(inspect.getsource(function))
    body = ast.parse(source).body[0].body
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def holds_to(steps, expected, *, lr=0.1, rtol=1e-9, atol=1e-12):
    """Assert that the loss, gradients and SGD update of the only step are those of an independent loss.

    `expected` computes that loss from the copy of the module from before the step.
    """
    (before,), (out,) = steps.before, steps.outs
    loss = expected(before)
    loss.backward()
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(out.loss.detach(), loss.detach(), **close)
    was, now = dict(before.named_parameters()), dict(steps.model.named_parameters())
    assert list(was) == list(now)
    moved = 0
    for name, p in now.items():
        gradient = torch.zeros_like(p) if was[name].grad is None else was[name].grad
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, gradient, **close, msg=lambda text, name=name: f"gradient of {name}: {text}")
        torch.testing.assert_close(p.detach(), was[name].detach() - lr * gradient, **close)
        moved += bool(gradient.any())
    assert moved > len(now) / 2, "most of it learns"


def kl(student, teacher, temperature):
    """T² KL(teacher || student) at every position."""
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def texts(*, labelled=0.5):
    """Two texts, the second one padded; some tokens have labels."""
    tokens = torch.randint(3, VOCAB, (2, 8))
    attention = torch.ones(2, 8, dtype=torch.long)
    attention[1, 5:] = 0
    hidden = (torch.rand(2, 8) >= labelled) | (attention == 0)
    return {"input_ids": tokens, "attention_mask": attention, "labels": tokens.masked_fill(hidden, -100)}


def asked(model, batch):
    """The output of a direct call of a model, with hidden states and without labels."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return model.eval()(**inputs, output_hidden_states=True)
