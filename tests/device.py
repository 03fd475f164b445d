"""The device that tests run on: the CPU, or the environment variable KDLOSS_DEVICE (such as "cuda"; see `make gpu`).

Tensors are then created on that device, random numbers are drawn there, numpy gets copies, and convolutions have the
precision of float32. Nothing else changes, so code that mixes devices fails. Processes started by tests use this
module as well.
"""

import os

import torch

NAME = os.environ.get("KDLOSS_DEVICE", "cpu")

# Words in the names of tests that run on the CPU only, with the reason.
LEFT_OUT = {
    "autocast": "it tests the autocast of the CPU",
    "under_a_scaler": "it tests the autocast of the CPU",
    "without_data": "it is about tensors without data",
    "meta_tensors": "it is about tensors without data",
    "three_digits": "rows are compared term by term only on a CPU, where reading a number needs no synchronisation",
    "few_logits_are_compared": "few logits are one block in float64 only on a CPU",
    "never_multiplied": "on a GPU, the number of counted positions is not known before the models run",
    "may_change_between_steps": "on a GPU no number of the logits is read to see such a change",
    "size_of_the_logits": "blocks of rows are larger on a GPU",
    "after_an_exception": "after an index out of range, a process can't use its GPU any more",
    "wrong_types_devices": "its messages name the CPU",
    "several_processes": "gloo can't gather on a GPU, and NCCL needs one GPU for each process",
}


def use():
    """Use the device from now on."""
    if NAME != "cpu":
        put_on(NAME)


def put_on(name):
    """Make tensors and random numbers on a device, and let numpy read them."""

    class Generator(torch.Generator):
        def __new__(cls, device=name):
            return super().__new__(cls, device)

    torch.set_default_device(name)
    torch.backends.cudnn.allow_tf32 = False
    torch.Generator = Generator
    to_numpy, to_array = torch.Tensor.numpy, torch.Tensor.__array__
    torch.Tensor.numpy = lambda x, **options: to_numpy(x.cpu(), **options)
    torch.Tensor.__array__ = lambda x, dtype=None: to_array(x.detach().cpu(), dtype)


def left_out(test):
    """The reason why a test of this name is left out on this device, or None."""
    return None if NAME == "cpu" else next((why for word, why in LEFT_OUT.items() if word in test), None)
