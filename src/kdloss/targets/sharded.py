"""Logits whose vocabulary is sharded over processes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Size, Tensor

from kdloss.targets.lazy import LazyLogits


@dataclass(frozen=True, eq=False)
class Shard:
    """One process's shard of a vocabulary, by the number of classes of each process in the group."""

    group: Any
    sizes: tuple[int, ...]

    @property
    def offset(self) -> int:
        """The first class of this process."""
        return sum(self.sizes[: dist.get_rank(self.group)])

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes, in place."""
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The maximum over processes, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


@dataclass(frozen=True, eq=False)
class ShardedLogits:
    r"""Vocabulary-parallel logits: each process of a group holds some of the classes of every position.

    Every process calls the loss with the same positions and labels, gets the loss over the whole
    vocabulary, and from its own `backward` the gradient of its own classes; the gradient by the hidden
    states of `LazyLogits` is summed over the group. A `DTensor` with placement `Shard(-1)` (logits) or
    `Shard(0)` (the weight and bias of `LazyLogits`) does not have to be wrapped.

    Shapes: local `[..., V / processes]`, in the order of the ranks, not necessarily of equal size; stands for
    `[..., V]`. `group` is a process group, None for all processes. `sizes` is the number of classes of each process,
    where you know it; otherwise the processes exchange it once.

    Raises: ValueError for tensors that are sharded over another dimension.

    >>> import os, tempfile
    >>> file = os.path.join(tempfile.mkdtemp(), "rendezvous")
    >>> dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    >>> import kdloss
    >>> kdloss.divergences.forward_kl(ShardedLogits(torch.zeros(2, 5)), ShardedLogits(torch.zeros(2, 5)))
    tensor([0., 0.])
    >>> dist.destroy_process_group()

    Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053.
    """

    local: Tensor | LazyLogits
    group: Any = None
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.sizes is None:
            mine = torch.tensor([self.local.shape[-1]], device=self.local.device)
            sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(sizes, mine, group=self.group)
            object.__setattr__(self, "sizes", tuple(int(size) for size in sizes))

    @property
    def shard(self) -> Shard:
        """The shard of the vocabulary in this process."""
        return Shard(self.group, self.sizes or ())

    @property
    def shape(self) -> Size:
        """The shape of the logits over the whole vocabulary."""
        return Size((*self.local.shape[:-1], sum(self.sizes or ())))

    @property
    def device(self) -> torch.device:
        """The device of this process's logits."""
        return self.local.device

    def at(self, pick: Callable[[Tensor], Tensor]) -> "ShardedLogits":
        """The same classes at chosen positions."""
        local = self.local.at(pick) if isinstance(self.local, LazyLogits) else pick(self.local)
        return replace(self, local=local)

    def detach(self) -> "ShardedLogits":
        """The same logits, detached."""
        return replace(self, local=self.local.detach())


def localised(x: Any) -> Any:
    """Turn `DTensor`s into local tensors, wrapped as `ShardedLogits` where they are sharded over the vocabulary."""
    if isinstance(x, LazyLogits) and _is_dtensor(x.weight):
        weight, bias, hidden = cast(Any, x.weight), cast(Any, x.bias), cast(Any, x.hidden)
        group = _group(weight, 0)
        bias = None if bias is None else bias.to_local()
        hidden = hidden.full_tensor() if _is_dtensor(hidden) else hidden
        local = replace(x, hidden=hidden, weight=weight.to_local(), bias=bias)
        return local if group is None else ShardedLogits(local, group)
    if _is_dtensor(x):
        group = _group(x, x.ndim - 1)
        return x.to_local() if group is None else ShardedLogits(x.to_local(), group)
    return x


def _is_dtensor(x: Any) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "placements") and hasattr(x, "device_mesh")


def _group(x: Any, dim: int) -> Any:
    """The process group over which this dimension is sharded; None for a tensor that isn't sharded."""
    sharded = [k for k, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not sharded:
        return None
    if len(sharded) > 1 or not x.placements[sharded[0]].is_shard(dim):
        raise ValueError(
            f"logits are sharded over their vocabulary, dimension {dim}, and over no other dimension, got "
            f"{x.placements}; write x.redistribute(placements=[Shard({dim})])"
        )
    return x.device_mesh.get_group(sharded[0])
