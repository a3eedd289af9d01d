"""FOA: test-time adaptation with forward passes only."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta import taps
from tta.adapter import Adapter, Config, require
from tta.functional import entropy, logits_of
from tta.methods._evolution import CMAES
from tta.source import Need


@dataclass
class FOAConfig(Config):
    """The defaults are the paper's for ImageNet-C.

    Attributes:
        num_prompts: prompt tokens; 0 leaves the shift of the features alone (FOA-Shift).
        population: prompts sampled for a batch, each at the cost of a forward; the last batch's best is tried too.
        lambda_: weight of the distance to the source's statistics, against the entropy.
        gain: share of the way back to the source's mean that the features are shifted.
        alpha: share of a batch in the moving average of the test features.
        source_batch_size: source images per batch; it does not change the statistics.
        initial_prompts: (1, num_prompts, width), tried with the first batch; None draws them.
    """

    num_prompts: int = 3
    population: int = 27
    lambda_: float = 0.4
    gain: float = 1.0
    alpha: float = 0.1
    source_batch_size: int = 64
    initial_prompts: Any = None

    def __post_init__(self) -> None:
        require(self.num_prompts >= 0, f"num_prompts={self.num_prompts}", "0 or more")
        require(self.population >= 4, f"population={self.population}", "4 or more prompts")
        require(self.lambda_ >= 0, f"lambda_={self.lambda_}", "a weight of 0 or more")
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}", "a share in [0, 1]")
        require(self.source_batch_size >= 1, f"source_batch_size={self.source_batch_size}", "1 or more")


class FOA(Adapter):
    """Search prompt tokens by an evolution strategy, and shift the features back to the source's mean; no gradient.

    Niu et al., "Test-Time Model Adaptation with Only Forward Passes", ICML 2024.

    For any timm ``VisionTransformer`` with a class token; its weights are frozen, so that it may be quantised. Prompts are
    better if the predictions are surer and the class tokens of all blocks nearer to the source's mean and standard
    deviation. Scored is the best of the prompts tried. A single image has no standard deviation: it is predicted with the
    best prompts so far and not learned from. ``source=`` gives unlabelled source images.
    """

    needs = "the class token of an image"
    config: FOAConfig
    source_mean: Tensor  # (layers * width,)
    source_std: Tensor
    prompts: Tensor  # the best so far, (1, num_prompts, width)
    test_mean: Tensor | None  # (width,), moving average of the features; None before the first batch

    @classmethod
    def source_needs(cls, model: nn.Module, config: FOAConfig) -> list[Need]:
        return [Need("token_moments", taps.class_token_layers(model))]

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self._layers = taps.class_token_layers(self.model)
        config, vit = self.config, taps.vision_transformer(self.model)
        if config.initial_prompts is None:
            prompts = taps.random_tokens(vit, config.num_prompts, self.generator)
        else:
            prompts = torch.as_tensor(config.initial_prompts).float()
            shape = (1, config.num_prompts, int(vit.embed_dim))  # type: ignore[arg-type]
            require(prompts.shape == shape, f"initial_prompts of shape {tuple(prompts.shape)}", f"{shape}")
        (known,) = self.known
        buffers = {"source_mean": known["mean"], "source_std": known["std"], "prompts": prompts}
        for name, value in buffers.items():
            self.register_buffer(name, value.to(self.device))
        self.register_buffer("test_mean", None)
        if config.num_prompts:
            self.search = CMAES(prompts.numel(), config.population)

    def adapt(self, x: Tensor) -> Tensor:
        if len(x) < 2 or not self.input_finite:
            return self.predict(x)
        with torch.no_grad():
            candidates = self._candidates()
            tried = [self._try(x, candidate) for candidate in candidates]
            fitness = torch.stack([fitness for fitness, _, _ in tried]).double().cpu().nan_to_num(torch.inf)
            best = int(fitness.argmin())
            mean = torch.stack([mean for _, _, mean in tried]).mean(0)
            if not mean.isfinite().all():  # it would stay in the moving average for good
                return tried[best][1]
            if self.config.num_prompts:
                self.search.tell(candidates.double().flatten(1).cpu(), fitness, injected=1)
            self.prompts.copy_(candidates[best].to(self.prompts))
            self.test_mean = mean if self.test_mean is None else torch.lerp(self.test_mean, mean, self.config.alpha)
            return tried[best][1]

    def predict(self, x: Tensor) -> Tensor:
        """Logits with the best prompts so far, and with the features shifted."""
        features, logits = self._look(x, self.prompts)
        return self._shifted(features, logits)

    def _candidates(self) -> Tensor:
        """Prompts to try, (number, 1, num_prompts, width): samples, and last the best of the batch before."""
        if not self.config.num_prompts:
            return self.prompts[None]
        sampled = self.search.ask(self._normals()).view(-1, *self.prompts.shape)
        return torch.cat([sampled, self.prompts[None].double().cpu()])

    def _normals(self) -> Tensor:
        shape = (self.config.population, self.prompts.numel())
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _try(self, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fitness of the prompts (a scalar, smaller is better), the logits to score, and the mean feature."""
        features, logits = self._look(x, prompts.float().to(x.device))
        std, mean = torch.std_mean(features, dim=0)
        distance = (std - self.source_std).square().sum() + (mean - self.source_mean).square().sum()
        # The entropy is a sum over the batch, so the distance grows with it: lambda_ is for the paper's batch of 64.
        fitness = self.config.lambda_ * distance * len(x) / 64 + entropy(logits).sum()
        return fitness, self._shifted(features, logits), mean[-self._width :]

    def _look(self, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens of all blocks, (batch, layers * width), and the logits."""
        with taps.extra_tokens(taps.vision_transformer(self.model), prompts):
            features, output = taps.class_tokens(self.model, self._layers, x)
        return features, logits_of(output)

    def _shifted(self, features: Tensor, logits: Tensor) -> Tensor:
        """The logits; after the first batch, those of features shifted towards the source's mean."""
        if self.test_mean is None:
            return logits
        shift = self.config.gain * (self.source_mean[-self._width :] - self.test_mean)
        return logits_of(self.model.get_submodule(self._layers[-1])(features[:, -self._width :] + shift))

    @property
    def _width(self) -> int:
        """Width of the features, the input of the head."""
        return self.prompts.shape[2]
