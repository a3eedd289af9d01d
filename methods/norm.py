"""Norm: normalise by the statistics of the test batches."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tta import norms
from tta.adapter import Adapter, Config, require


@dataclass
class NormConfig(Config):
    """Three modes of one rule, ``statistics = (1 - a) * stored + a * batch``.

    * batch statistics (the default, ``alpha=1``): the batch alone, with its biased variance, as in training mode;
    * blend (``alpha`` below 1): the source statistics as a prior, batch variance unbiased, nothing remembered between
      batches. N pseudo-samples of source against a batch of n is ``alpha = n / (N + n)``;
    * moving average (``momentum`` given): the stored statistics start at the source's and take in each batch with
      this weight, before they are used.

    Attributes:
        alpha: weight of the batch statistics, in [0, 1]; 0 is the source model. (The published symbol for the weight of
            the *source* statistics is ``1 - alpha``.)
        momentum: weight of each new batch in the moving average, in (0, 1]; None for no memory.
        frozen: frozen BatchNorm layers, as torchvision's pretrained detectors have: ``"refuse"`` the model, or ``"thaw"`` them:
            they become BatchNorm2d layers of the same values.
    """

    alpha: float = 1.0
    momentum: float | None = None
    frozen: Literal["refuse", "thaw"] = "refuse"

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}", "a weight of the batch statistics in [0, 1]")
        require(self.frozen in ("refuse", "thaw"), f"frozen={self.frozen!r}", "'refuse' or 'thaw'")
        if self.momentum is not None:
            require(0 < self.momentum <= 1, f"momentum={self.momentum}", "a weight of the new batch in (0, 1]")
            require(self.alpha == 1, f"alpha={self.alpha} with momentum={self.momentum}", "one of the two, not both")


class Norm(Adapter):
    """Replace the source statistics of the BatchNorm layers by those of the test data; no gradient, one forward.

    Batch statistics: Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate
    Shift", arXiv 2006.10963, 2020. Blend: Schneider et al., "Improving robustness against common corruptions by
    covariate shift adaptation", NeurIPS 2020.

    A GroupNorm or LayerNorm model has no BatchNorm layers and is refused: on it this method is the source model.
    """

    distributed = True
    multi_label = True
    tasks = ("classification", "segmentation", "regression", "detection")
    config: NormConfig

    def configure_model(self) -> None:
        norms.thaw(self.model) if self.config.frozen == "thaw" else norms.refuse_frozen(self.model)
        self.model.requires_grad_(False)
        layers = norms.layers(self.model, norms.BATCH_NORMS)
        if self.config.momentum is not None:
            norms.blend_statistics(self.model, self.config.momentum)
        elif self.config.alpha < 1:
            norms.blend_statistics(self.model, self.config.alpha)
        elif all(layer.running_mean is None for layer in layers):
            raise ValueError(
                f"The {len(layers)} BatchNorm layers of {type(self.model).__name__} keep no running statistics "
                "(track_running_stats=False): they normalise by the batch already, so that this method would be the source "
                "model. Use one that learns, such as tent."
            )
        else:
            for layer in layers:
                norms.use_batch_statistics(layer)

    def adapt(self, x: Tensor) -> Tensor:
        if self.config.momentum is None:
            return self.predict(x)
        with norms.remembering(self.model, when=self.input_finite):
            return self.predict(x)
