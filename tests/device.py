"""The device that tests run on: the CPU, or what the environment variable KDLOSS_DEVICE says ("cuda"), see `make gpu`.

There tensors are made on the device, random numbers are drawn there, numpy gets copies, and convolutions have the
digits of float32. Everything else is as it is, so that what mixes devices fails. Processes that tests start look here
as well.
"""

import os

import torch

NAME = os.environ.get("KDLOSS_DEVICE", "cpu")

# Tests that stay on the CPU, by words in their names, and why.
LEFT_OUT = {
    "autocast": "it is written for the CPU's autocast",
    "under_a_scaler": "it is written for the CPU's autocast",
    "without_data": "it is about tensors without data",
    "meta_tensors": "it is about tensors without data",
    "three_digits": "rows are compared term by term only where reading numbers needs no synchronisation",
    "few_logits_are_compared": "few logits are one block in float64 on a CPU",
    "never_multiplied": "how many positions count is not known there before the models run",
    "size_of_the_logits": "blocks of rows are larger there",
    "after_an_exception": "an index out of range ends all work on a card",
    "wrong_types_devices": "its messages name the CPU",
    "several_processes": "gloo gathers nothing on a card, and NCCL wants one for each process",
}


def use():
    """Run what follows on the device."""
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
    """Why a test of this name is left out on this device; None if it isn't."""
    return None if NAME == "cpu" else next((why for word, why in LEFT_OUT.items() if word in test), None)
