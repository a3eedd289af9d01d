"""Settings of a source stage."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tta.messages import require
from tta.precision import PRECISIONS

AUGMENTS = ("paper", "crop", "none")
SCHEDULES = ("cosine", "steps", "one-cycle", "constant")


@dataclass
class TrainSettings:
    """Settings of a source stage; the defaults train a network for CIFAR from scratch.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; a last batch that is smaller is left out.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: learning rate, the highest of its schedule.
        momentum: SGD only.
        weight_decay: as the optimizer defines it.
        decay_vectors: whether biases and the scales of normalisation layers decay too.
        schedule: of the learning rate, step by step: ``"cosine"`` to 0, ``"steps"`` (a tenth from half of the training on, a
            hundredth from five sixths on, as for TTT), ``"one-cycle"`` (a rise over the first tenth, then a cosine), ``"constant"``.
        label_smoothing: of plain training, in [0, 1); a method has losses of its own.
        augment: ``"paper"`` (padded crop, mirrored), ``"crop"``, ``"none"``, or from Python a callable of a batch in [0, 1] and a
            ``torch.Generator``. A method that makes augmented copies at test time uses the same ones, unless it is a callable.
        validation: share of the images that are held out, one or more, and of which the error is measured after each epoch; 0: none.
        patience: epochs without a smaller error, after which training stops; the best weights are kept. 0: the last ones are.
        save_every: steps between two checkpoints that a stopped training resumes from.
        seed: of all that is drawn.
        checkpoint: weights to start from.
        pretrained: start from the weights that the model's name stands for.
        num_classes: of the classifier, if it differs from the model's own; where it differs from that of the weights to start
            from, the head starts at random.
        mean: of the images, see :func:`tta.load_model`.
        std: likewise.
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        num_workers: processes that read images; they change no number.
        logger: ``"csv"`` or ``"tensorboard"`` into FILE.logs, ``"none"``.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_vectors: bool = True
    schedule: Literal["cosine", "steps", "one-cycle", "constant"] = "cosine"
    label_smoothing: float = 0.0
    augment: Any = "paper"
    validation: float = 0.1
    patience: int = 0
    save_every: int = 100
    seed: int = 0
    checkpoint: str | None = None
    pretrained: bool = False
    num_classes: int | None = None
    mean: Any = None
    std: Any = None
    accelerator: str = "auto"
    precision: str = "32-true"
    num_workers: int = 0
    logger: Literal["csv", "tensorboard", "none"] = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")
        require(self.optimizer in ("sgd", "adamw"), f"optimizer={self.optimizer!r}", "'sgd' or 'adamw'")
        require(0 < self.lr < math.inf, f"lr={self.lr}", "a learning rate above 0, and finite")
        require(0 <= self.momentum < 1, f"momentum={self.momentum}", "a value in [0, 1)")
        require(0 <= self.weight_decay < math.inf, f"weight_decay={self.weight_decay}", "a finite value of 0 or more")
        require(self.schedule in SCHEDULES, f"schedule={self.schedule!r}", f"one of {', '.join(SCHEDULES)}")
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing}", "a share in [0, 1)")
        known = callable(self.augment) or self.augment in AUGMENTS
        require(known, f"augment={self.augment!r}", f"{', '.join(AUGMENTS)} or a callable")
        require(0 <= self.validation < 1, f"validation={self.validation}", "a share in [0, 1)")
        require(self.patience >= 0, f"patience={self.patience}", "epochs, 0 for no early stop")
        require(not self.patience or self.validation > 0, "patience without validation", "a validation= above 0")
        require(self.num_workers >= 0, f"num_workers={self.num_workers}", "0 or more processes")
        require(self.precision in PRECISIONS, f"precision={self.precision!r}", " or ".join(PRECISIONS))
        require(self.logger in ("csv", "tensorboard", "none"), f"logger={self.logger!r}", "csv, tensorboard or none")
