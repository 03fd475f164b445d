"""Training of the criterion's parameters by a Trainer, which by itself trains only the student's."""

from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object


class Learning(Trainer):
    """Optimises the criterion's parameters, and clips, averages over processes and zeroes their gradients."""

    criterion: Any
    optimizer: Any
    accelerator: Any
    _left_to_trainer: bool

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.add_callback(_AfterStep(self.criterion))

    @property
    def _learned(self) -> list[nn.Parameter]:
        """The criterion's trained parameters; none if the criterion is left to the Trainer."""
        return [] if self._left_to_trainer else [p for p in self.criterion.parameters() if p.requires_grad]

    def create_optimizer(self, *given: Any) -> Any:
        """The Trainer's optimizer with the criterion's parameters, which start equal on all processes."""
        said = self.optimizer is not None
        optimizer = super().create_optimizer(*given)
        for p in self._learned:
            p.data = broadcast(p.data)
        known = {p for group in optimizer.param_groups for p in group["params"]}
        new = [p for p in self._learned if p not in known]
        if new and said:
            raise ValueError(
                "the optimizer that was given lacks what the criterion learns; make the trainer without it and write "
                "trainer.optimizer = Optimizer([*model.parameters(), *trainer.criterion.parameters()])"
            )
        matrices, vectors = ([p for p in new if (p.ndim > 1) == many] for many in (True, False))
        for group, decay in ((matrices, self.args.weight_decay), (vectors, 0.0)):
            if group:
                optimizer.add_param_group({"params": group, "weight_decay": decay})
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's accelerator, made to clip the criterion's gradients together with the student's."""
        super().create_accelerator_and_postprocess()
        clip: Any = self.accelerator.clip_grad_norm_
        accelerator: Any = self.accelerator
        accelerator.clip_grad_norm_ = lambda own, *limit, **more: clip([*own, *self._learned], *limit, **more)

    def training_step(self, *args: Any, **settings: Any) -> Tensor:
        """The Trainer's step; the criterion's gradients are averaged here, since DDP averages only the student's."""
        loss: Tensor = super().training_step(*args, **settings)
        if self.accelerator.sync_gradients:
            for p in self._learned:
                p.grad = None if p.grad is None else self.accelerator.reduce(p.grad, "mean")
        return loss


class _AfterStep(TrainerCallback):
    """Does for the criterion what a Trainer does only for its model: zeroes gradients, and counts steps."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.criterion.zero_grad()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.criterion.zero_grad()
        if hasattr(self.criterion, "advance"):
            self.criterion.advance()
