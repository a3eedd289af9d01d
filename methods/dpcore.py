"""DPCore: dynamic prompt coreset."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tta import taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import logits_of
from tta.source import Need


@dataclass
class DPCoreConfig(OptimizerConfig):
    """The defaults are the released code's for ImageNet; the authors' CIFAR settings are unreleased.

    Attributes:
        num_prompts: prompt tokens.
        steps_new: optimizer steps on a batch of a new domain; ``steps`` on one of a known domain.
        rho: a domain is known if the weighted prompts bring the features below ``rho`` times the distance without them.
        tau: temperature of the weights of the coreset's elements.
        alpha: rate at which elements follow a known domain, times their weight: near 1 every batch nearly overwrites the
            element that fits best (not a slow moving average, as elsewhere).
        lambda_: weight of the distance between standard deviations.
        source_samples: number of source images whose features count, the first ones; None for all given.
        source_filter: entropy in nats above which source images are left out; None for no filter, ``2.454``
            (ln(1000) / 2 - 1) in the released code, which has random prompts while it filters.
        source_batch_size: source images per batch; it does not change the statistics.
        initial_prompts: (1, num_prompts, width), that every new domain starts from; None draws them.
        capacity: largest number of elements in the coreset. A further one replaces that with the nearest statistics.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adamw"
    lr: float = 0.1
    weight_decay: float = 0.01
    num_prompts: int = 8
    steps_new: int = 50
    rho: float = 0.8
    tau: float = 3.0
    alpha: float = 0.999
    lambda_: float = 1.0
    source_samples: int | None = None
    source_filter: float | None = None
    source_batch_size: int = 64
    initial_prompts: Any = None
    capacity: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "steps_new", "source_batch_size", "capacity"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")
        require(self.rho > 0, f"rho={self.rho}", "a factor above 0")
        require(self.tau > 0, f"tau={self.tau}", "a temperature above 0")
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}", "a rate in [0, 1]")
        require(self.lambda_ >= 0, f"lambda_={self.lambda_}", "a weight of 0 or more")
        require(
            self.source_samples is None or self.source_samples >= 2,
            f"source_samples={self.source_samples}",
            "2 or more, for a standard deviation",
        )


class Moments(NamedTuple):
    """Mean and standard deviation of features, each (..., width); a single image has no standard deviation."""

    mean: Tensor
    std: Tensor | None


class DPCore(Adapter):
    """Learn prompt tokens that bring the features to the source's moments, and keep those of each domain met.

    Zhang et al., "DPCore: Dynamic Prompt Coreset for Continual Test-Time Adaptation", ICML 2025.

    For any timm ``VisionTransformer``, of any width and pooling; its weights are frozen. Scored are the logits of
    the last forward before its step. A single image is predicted with the prompts of the elements its features are
    nearest to, and neither learned from nor kept. ``source=`` gives unlabelled source images.
    """

    needs = "the class token of an image"
    config: DPCoreConfig
    source_mean: Tensor
    source_std: Tensor
    initial: Tensor
    # The coreset. A new element has the moments of features without prompts; later it is pulled to features with prompts,
    # as published. (capacity, width) twice, (capacity, num_prompts, width), and the number of elements in use.
    means: Tensor
    stds: Tensor
    prompt_sets: Tensor
    size: Tensor

    @classmethod
    def source_needs(cls, model: nn.Module, config: DPCoreConfig) -> list[Need]:
        taps.vision_transformer(model)  # raises an error that says what is missing
        settings = {"samples": config.source_samples, "max_entropy": config.source_filter}
        return [Need("feature_moments", (taps.head(model),), settings=settings)]

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self._head = taps.head(self.model)
        vit: Any = taps.vision_transformer(self.model)
        config, shape = self.config, (1, self.config.num_prompts, vit.embed_dim)
        if config.initial_prompts is None:
            initial = taps.random_tokens(vit, config.num_prompts, self.generator)
        else:
            initial = torch.as_tensor(config.initial_prompts).float()
            require(initial.shape == shape, f"initial_prompts of shape {tuple(initial.shape)}", f"{shape}")
        (known,) = self.known
        coreset = {
            "means": torch.zeros(config.capacity, len(known["mean"])),
            "stds": torch.zeros(config.capacity, len(known["std"])),
            "prompt_sets": torch.zeros(config.capacity, *shape[1:]),
            "size": torch.zeros((), dtype=torch.int64),
        }
        buffers = {"source_mean": known["mean"], "source_std": known["std"], "initial": initial, **coreset}
        for name, value in buffers.items():
            self.register_buffer(name, value.to(self.device))
        self.prompts = nn.Parameter(self.initial.clone())

    @property
    def coreset_size(self) -> int:
        """Number of elements in the coreset; about one per domain is usual."""
        return int(self.size)

    def adapt(self, x: Tensor) -> Tensor:
        assert self.optimizer is not None
        with torch.no_grad():
            if len(x) < 2:
                return self.predict(x)
            logits, plain = self._look(x)
            distance = self._distance(plain, self._source_moments)
            if not (distance.isfinite() and self.input_finite):  # as an element it would spoil every weight from now on
                return logits
        self.optimizer.state.clear()  # the steps on each batch start without momentum
        # The branch decides between 1 and 50 steps: here the host has to wait for the device.
        if self.coreset_size:
            weights = self._weights(plain)
            self._set_prompts(self._blend(weights))
            first = self._look(x, self.prompts)
            if self._distance(first[1], self._source_moments) < self.config.rho * distance:
                logits, prompted = self._learn(x, self.config.steps, first)
                self._follow(weights, prompted)
                return logits
            del first
        self._set_prompts(self.initial)
        logits, _ = self._learn(x, self.config.steps_new)
        self._keep(plain)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Logits with the weighted prompts if these bring the batch as near to the source as a known domain, else without."""
        logits, plain = self._look(x)
        if not self.coreset_size:
            return logits
        prompted_logits, prompted = self._look(x, self._blend(self._weights(plain)))
        if len(x) < 2:  # one image is far from the mean of many, with prompts or without
            return prompted_logits
        distance, without = (self._distance(m, self._source_moments) for m in (prompted, plain))
        return torch.where(distance < self.config.rho * without, prompted_logits, logits)

    @property
    def _source_moments(self) -> Moments:
        return Moments(self.source_mean, self.source_std)

    def _look(self, x: Tensor, prompts: Tensor | None = None) -> tuple[Tensor, Moments]:
        """Logits of the batch and moments of its features, in one forward."""
        vit = taps.vision_transformer(self.model)
        joined = nullcontext() if prompts is None else taps.extra_tokens(vit, prompts)
        with joined, taps.inputs(self.model, self._head) as seen:
            logits = logits_of(self.model(x))
        features = seen[0].float()
        if len(features) < 2:
            return logits, Moments(features[0], None)
        std, mean = torch.std_mean(features, dim=0)
        return logits, Moments(mean, std)

    def _distance(self, moments: Moments, others: Moments) -> Tensor:
        distance: Tensor = (moments.mean - others.mean).norm(dim=-1)
        if moments.std is not None and others.std is not None:
            distance = distance + self.config.lambda_ * (moments.std - others.std).norm(dim=-1)
        return distance

    def _learn(self, x: Tensor, steps: int, first: tuple[Tensor, Moments] | None = None) -> tuple[Tensor, Moments]:
        """Optimise the prompts for the distance to the source; logits and moments of the last forward, before its step."""
        for _ in range(steps):
            logits, moments = first or self._look(x, self.prompts)
            first = None
            self.update(self._distance(moments, self._source_moments))
        return logits, moments

    def _weights(self, plain: Moments) -> Tensor:
        """Weight of each place of the coreset, (capacity,): zero where there is no element."""
        distances = self._distance(plain, Moments(self.means, self.stds))
        return (-distances / self.config.tau).masked_fill(~self._in_use, -torch.inf).softmax(0)

    @property
    def _in_use(self) -> Tensor:
        return torch.arange(self.config.capacity, device=self.device) < self.size

    def _blend(self, weights: Tensor) -> Tensor:
        prompts: Tensor = torch.tensordot(weights, self.prompt_sets, 1)
        return prompts[None]

    @torch.no_grad()
    def _set_prompts(self, value: Tensor) -> None:
        self.prompts.copy_(value)

    @torch.no_grad()
    def _follow(self, weights: Tensor, prompted: Moments) -> None:
        """Pull the elements towards the batch, each by its weight; standard deviations only grow, as published."""
        assert prompted.std is not None
        rate = (self.config.alpha * weights)[:, None]
        self.means += rate * (prompted.mean - self.means)
        self.stds += rate * (prompted.std - self.stds).clamp(min=0)
        self.prompt_sets += rate[..., None] * (self.prompts - self.prompt_sets)

    @torch.no_grad()
    def _keep(self, plain: Moments) -> None:
        """Add an element; in a full coreset it replaces the nearest one."""
        assert plain.std is not None
        full = self.coreset_size == self.config.capacity
        place = self._distance(plain, Moments(self.means, self.stds)).argmin() if full else self.size.clone()
        self.means[place], self.stds[place], self.prompt_sets[place] = plain.mean, plain.std, self.prompts[0]
        self.size += not full
