"""OnZeta: online zero-shot classification."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tta.adapter import Config, require
from tta.functional import matmul
from tta.methods._views import TwoTowersAdapter


@dataclass
class OnZetaConfig(Config):
    """The defaults are the paper's for ImageNet: 1000 classes, 50 000 images.

    Attributes:
        length: images in the stream, which must be known: the proxies count more towards its end.
        dual_rate: step of the dual variables, which hold the shares of the classes; 20 is for 1000 classes.
        proxy_rate: step of the class proxies.
        tau_text: temperature of the prediction by class names; 0.01 is that of OpenAI's CLIP.
        tau_image: temperature of the prediction by proxies.
        alpha: least share of a class, times the number of classes; 1 drives them all to the same share.
        beta: weight of the proxies at the end of the stream; 0 leaves the prediction by class names, re-weighted.
    """

    length: int = 50_000
    dual_rate: float = 20.0
    proxy_rate: float = 0.5
    tau_text: float = 0.01
    tau_image: float = 0.04
    alpha: float = 1.0
    beta: float = 0.8

    def __post_init__(self) -> None:
        require(self.length >= 1, f"length={self.length}", "1 or more images")
        for name in ("tau_text", "tau_image"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)}", "a temperature above 0")
        require(0 <= self.beta <= 1, f"beta={self.beta}", "a weight in [0, 1]")
        for name in ("dual_rate", "proxy_rate", "alpha"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "0 or more")


class OnZeta(TwoTowersAdapter):
    """Balance the classes that are predicted, and move a proxy of each class from its name towards the images.

    Qian and Hu, "Online Zero-Shot Classification with CLIP", ECCV 2024.

    For a vision-language model, see :class:`tta.TwoTowers`; no gradient through a tower. An image is predicted by what the images
    before it left. Steps made for 1000 classes throw ten classes about: take a smaller ``dual_rate``. Returned are logarithms
    of probabilities.
    """

    config: OnZetaConfig
    proxies: Tensor  # (classes, width)
    duals: Tensor  # (classes,)
    images: Tensor  # met so far

    def configure_model(self) -> None:
        super().configure_model()
        features = self.towers.class_features
        self.register_buffer("proxies", features.clone())
        self.register_buffer("duals", features.new_zeros(len(features)))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self._next(feature) for feature in self.look(x)[0]])

    def _next(self, feature: Tensor) -> Tensor:
        by_names, by_proxies = self._by_names(feature), self._by_proxies(feature)
        found = self._mixed(by_names, by_proxies)
        step, fit = (self.images + 1).float().rsqrt(), self.input_finite
        excess = by_names.exp() - self.config.alpha / len(by_names)  # over the least share of a class
        duals = (self.duals - self.config.dual_rate * step * excess).clamp(min=0)
        towards = torch.outer(by_proxies.exp() - by_names.exp(), feature)
        moved = self.proxies - self.config.proxy_rate / self.config.tau_image * step * towards
        self.duals.copy_(torch.where(fit, duals, self.duals))
        self.proxies.copy_(torch.where(fit, F.normalize(moved, dim=1), self.proxies))
        self.images += fit
        return found

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logarithms of probabilities by class names and present proxies."""
        features = self.look(x)[0]
        return torch.stack([self._mixed(self._by_names(feature), self._by_proxies(feature)) for feature in features])

    def _by_names(self, feature: Tensor) -> Tensor:
        """Logarithms of the probabilities by class names, times the exponentials of the duals, (classes,)."""
        cosines = matmul(self.towers.class_features, feature)
        return (cosines / self.config.tau_text + self.duals).log_softmax(0)

    def _by_proxies(self, feature: Tensor) -> Tensor:
        """Logarithms of the probabilities by proxies, (classes,)."""
        return (matmul(self.proxies, feature) / self.config.tau_image).log_softmax(0)

    def _mixed(self, by_names: Tensor, by_proxies: Tensor) -> Tensor:
        share = ((self.images + 1) / self.config.length).clamp(max=1).sqrt() * self.config.beta
        return torch.logaddexp(share.log() + by_proxies, (1 - share).log() + by_names)
