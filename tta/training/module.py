"""The source stage as a LightningModule, and what keeps its state on disk."""

import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, auxiliary, places
from tta.functional import logits_of
from tta.training.data import drawn_from
from tta.training.settings import TrainSettings


class SourceModule(pl.LightningModule):
    """A classifier in training, with the auxiliary part of a method or alone.

    All that a step draws, dropout included, comes from the seed and the number of the step.

    Args:
        model: the classifier, on images in [0, 1].
        part: of the method; None for plain training.
        method: the class that defines ``source_losses``; None for plain training.
        config: its hyper-parameters.
        settings: of the training.
        steps: number of all steps.
    """

    def __init__(
        self, model: nn.Module, part: nn.Module | None, method: Any, config: Any, settings: TrainSettings, steps: int
    ) -> None:
        super().__init__()
        self.model, self.part = model, part
        self.method, self.config, self.settings, self.steps = method, config, settings, steps
        self.facts: dict[str, Any] = {}  # in each checkpoint, which resumes a training of the same settings only
        self._wrong = self._seen = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["source_stage"] = self.facts

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        generator = drawn_from(self.settings.seed + 1, self.global_step)
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # of dropout
        images, labels = batch
        images = augmented(images, self.settings.augment, generator)
        smoothing = self.settings.label_smoothing
        if self.method is None:
            losses = {
                "classification": F.cross_entropy(logits_of(self.model(images)), labels, label_smoothing=smoothing)
            }
        else:
            losses = self.method.source_losses(self.model, self.part, images, labels, self.config, generator)
        self.log_dict({f"loss/{name}": value.detach() for name, value in losses.items()}, prog_bar=True)
        return torch.stack([*losses.values()]).sum()

    def on_validation_epoch_start(self) -> None:
        self._wrong = self._seen = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self._wrong += int((logits_of(self.model(images)).argmax(1) != labels).sum())
        self._seen += len(labels)

    def on_validation_epoch_end(self) -> None:
        self.log("validation_error", 100 * self._wrong / max(1, self._seen), prog_bar=True)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        own = [] if self.part is None else auxiliary.own_parameters(self.part, self.model)
        factor = 1.0 if self.method is None else getattr(self.method, "part_lr", 1.0)
        groups = []
        for parameters, lr in ((list(self.model.parameters()), settings.lr), (own, factor * settings.lr)):
            learned = [parameter for parameter in parameters if parameter.requires_grad]
            for vectors in (False, True):
                chosen = [parameter for parameter in learned if (parameter.dim() <= 1) == vectors]
                decay = settings.weight_decay if settings.decay_vectors or not vectors else 0.0
                if chosen:
                    groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[settings.optimizer]
        optimizer = kind(
            groups, lr=settings.lr, **({"momentum": settings.momentum} if settings.optimizer == "sgd" else {})
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Learning rate at a step, in the highest one."""
        done = min(step / self.steps, 1.0)
        kind = self.settings.schedule
        if kind == "constant":
            return 1.0
        if kind == "steps":
            return 1.0 if done < 1 / 2 else 0.1 if done < 5 / 6 else 0.01
        if kind == "one-cycle":
            if done < 0.1:
                return 0.04 + 0.96 * (1 - math.cos(math.pi * done / 0.1)) / 2
            done = (done - 0.1) / 0.9
        return (1 + math.cos(math.pi * done)) / 2


def augmented(images: Tensor, choice: Any, generator: torch.Generator) -> Tensor:
    """A batch as a step sees it, see :class:`tta.training.TrainSettings`."""
    if callable(choice):
        made: Tensor = choice(images, generator)
        return made
    return augment.training_view(images, choice, generator)


class Resumable(Callback):
    """Saves the training's whole state every so many steps and after each epoch, in one file that is never half written.

    Parts that a killed process left beside it are removed when the training begins.
    """

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every = file, every

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in places.abandoned(self.file, ours=True):
            part.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = batch_idx + 1 >= trainer.num_training_batches  # validation comes first, then on_train_epoch_end
        if trainer.global_step % self.every == 0 and not last:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        part = places.unfinished(self.file)
        try:
            trainer.save_checkpoint(part)
            os.replace(part, self.file)
        finally:
            part.unlink(missing_ok=True)


class Best(Callback):
    """Keeps the weights of the smallest validation error so far; of equals, the first."""

    def __init__(self) -> None:
        self.error, self.weights = math.inf, dict[str, Tensor]()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        error = float(trainer.callback_metrics.get("validation_error", math.inf))
        if not trainer.sanity_checking and error < self.error:
            self.error = error
            self.weights = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"error": self.error, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.error, self.weights = state_dict["error"], state_dict["weights"]
