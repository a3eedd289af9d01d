"""AdaContrast: contrastive test-time adaptation, online."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import augment, ema, norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import matmul


@dataclass
class AdaContrastConfig(OptimizerConfig):
    """The paper is offline; the defaults are those of a later benchmark's online port.

    Attributes:
        mt_alpha: share of itself that the teacher keeps at each step.
        temperature: of the contrast.
        queue_size: keys that a view is contrasted with, and samples among which neighbours are looked for.
        neighbours: samples whose predictions are averaged into a pseudo-label.
        refine_after: samples seen before pseudo-labels are taken from neighbours; those of the model before.
        alpha, beta, eta: weights of the classification, the contrast and the diversity.
        augment: ``"paper"`` (RGB images in [0, 1]): a mirrored view, and two that change colours and blur as well;
            ``"none"``, or from Python a callable that maps a batch to a view of it.
        bank: samples that new ones replace when the neighbours are full: the ``"oldest"``, or for one batch the newest, as
            in the ``"released"`` code.
        mask: labels by which keys of a view's own class are left out: ``"keys"``, their own, or, as ``"released"``, those of
            the keys that replace them.
        initial_keys: (queue_size, width), of length 1, that the queue starts with; None draws them.
        initial_labels: (queue_size,), their classes; None draws them.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 2e-4
    weight_decay: float = 1e-4
    nesterov: bool = True
    mt_alpha: float = 0.999
    temperature: float = 0.07
    queue_size: int = 16384
    neighbours: int = 10
    refine_after: int = 1024
    alpha: float = 1.0
    beta: float = 1.0
    eta: float = 1.0
    augment: Any = "paper"
    bank: Literal["oldest", "released"] = "oldest"
    mask: Literal["keys", "released"] = "keys"
    initial_keys: Any = None
    initial_labels: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mt_alpha <= 1, f"mt_alpha={self.mt_alpha}", "a share in [0, 1]")
        require(self.temperature > 0, f"temperature={self.temperature}", "a temperature above 0")
        require(self.queue_size >= 1, f"queue_size={self.queue_size}", "1 or more")
        known = 1 <= self.neighbours <= self.queue_size
        require(known, f"neighbours={self.neighbours}", f"1 to queue_size={self.queue_size}")
        require(self.refine_after >= 0, f"refine_after={self.refine_after}", "0 or more samples")
        augment.check(self.augment)
        require(self.bank in ("oldest", "released"), f"bank={self.bank!r}", "'oldest' or 'released'")
        require(self.mask in ("keys", "released"), f"mask={self.mask!r}", "'keys' or 'released'")


class AdaContrast(Adapter):
    """Learn pseudo-labels refined by neighbours, and features that set a view apart from those of other classes.

    Chen et al., "Contrastive Test-Time Adaptation", CVPR 2022; features are the input of the head, whatever layer that is.

    All parameters adapt. BatchNorm layers normalise a step by its views, which also move their statistics, and predict by
    these. Scored are the logits after the update. The diversity is the batch's: it hurts where batches hold few classes.
    """

    needs = "one class and one feature vector an image"
    config: AdaContrastConfig
    scored_forward = "after"
    keys: Tensor  # (queue_size, width)
    key_labels: Tensor
    bank_features: Tensor  # (queue_size, width), by the teacher
    bank_probabilities: Tensor
    offered: Tensor  # samples so far

    def configure_model(self) -> None:
        config = self.config
        self.model.requires_grad_(True)
        self._head = taps.head(self.model)
        head: Any = self.model.get_submodule(self._head)
        self.teacher = ema.frozen_copy(self.model)
        for _, layer in norms.named_layers(self.teacher, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
        shape = (config.queue_size, head.in_features)
        keys, labels = config.initial_keys, config.initial_labels
        if keys is None:
            keys = F.normalize(torch.randn(shape, generator=self.generator))
        if labels is None:
            labels = torch.randint(head.out_features, shape[:1], generator=self.generator)
        keys, labels = (torch.as_tensor(value).clone() for value in (keys, labels))  # the given tensors are not changed
        require(keys.shape == shape, f"initial_keys of shape {tuple(keys.shape)}", f"{shape}")
        require(labels.shape == shape[:1], f"initial_labels of shape {tuple(labels.shape)}", f"{shape[:1]}")
        buffers = {
            "keys": keys.float(),
            "key_labels": labels.long(),
            "bank_features": torch.zeros(shape),
            "bank_probabilities": torch.zeros(shape[0], head.out_features),
            "offered": torch.zeros((), dtype=torch.int64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.to(self.device))

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            self._learn(x)
        with torch.no_grad():
            return self.predict(x)

    def _learn(self, x: Tensor) -> None:
        config = self.config
        weak, query, key = self._views(x)
        with norms.training_statistics(self.model, when=self.input_finite):
            with torch.no_grad():
                features, logits = taps.look(self.model, self._head, weak)
                labels = self._refined(features, logits.softmax(1)).argmax(1)
            features, logits = taps.look(self.model, self._head, query)
        ema.follow(self.teacher, self.model, 1 - config.mt_alpha, when=self.input_finite)
        with torch.no_grad():
            keys = F.normalize(taps.look(self.teacher, self._head, key)[0])
        negatives, negative_labels = self.keys.clone(), self.key_labels.clone()
        self._put(self.offered, (self.keys, keys), (self.key_labels, labels))
        same = labels[:, None] == (negative_labels if config.mask == "keys" else self.key_labels)
        unit = F.normalize(features)
        against = matmul(unit, negatives.T).masked_fill(same, -torch.inf)
        contrast = torch.cat([(unit * keys).sum(1, keepdim=True), against], dim=1) / config.temperature
        mean = logits.softmax(1).mean(0)
        classification = F.cross_entropy(logits, labels)
        instances = F.cross_entropy(contrast, torch.zeros_like(labels))
        diversity = (mean * (mean + 1e-8).log()).sum()
        self.update(config.alpha * classification + config.beta * instances + config.eta * diversity)
        with torch.no_grad():
            features, logits = taps.look(self.teacher, self._head, weak)
        start = self.offered
        if config.bank == "released":  # its pointer lags a batch behind, once the bank is full
            start = torch.where(start >= config.queue_size, start - len(x), start)
        self._put(start, (self.bank_features, features), (self.bank_probabilities, logits.softmax(1)))
        self.offered += len(x) * self.input_finite

    def _views(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One weak view and two strong ones."""
        if self.config.augment == "paper":
            weak = augment.flipped(x, self.generator)
            return weak, augment.moco_view(x, self.generator), augment.moco_view(x, self.generator)
        view = augment.augmentation(self.config.augment, self.generator)
        return view(x), view(x), view(x)

    def _refined(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """The mean prediction of the nearest neighbours, once enough samples were seen."""
        filled = torch.arange(self.config.queue_size, device=features.device) < self.offered
        similarity = matmul(F.normalize(features), F.normalize(self.bank_features).T)
        nearest = similarity.masked_fill(~filled, -torch.inf).topk(self.config.neighbours, dim=1).indices
        # an empty place holds zeros, which change no arg-max
        refined = self.bank_probabilities[nearest].mean(1)
        return torch.where((self.offered >= self.config.refine_after) & (self.offered > 0), refined, probabilities)

    @torch.no_grad()
    def _put(self, start: Tensor, *queues: tuple[Tensor, Tensor]) -> None:
        """Write a row for each sample into the ring buffers, from ``start`` on; nothing if the batch is not finite."""
        size = self.config.queue_size
        number = len(queues[0][1])
        slots = (start + torch.arange(number, device=start.device))[-size:] % size
        finite = torch.stack([self.input_finite, *(values.isfinite().all() for _, values in queues)]).all()
        for queue, values in queues:
            queue[slots] = torch.where(finite, values[-size:].to(queue.dtype), queue[slots])
