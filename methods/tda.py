"""TDA: training-free dynamic adapter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tta.methods._tda import CachesConfig, Evidence, TwoCaches


@dataclass
class TDAConfig(CachesConfig):
    """The defaults are the paper's for ImageNet, where an image has one view. Those of other sets were chosen on their tests."""


class TDA(TwoCaches):
    """Correct the logits by a cache of sure images of each class, and by one of unsure images, which speaks against classes.

    Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", CVPR 2024.

    For a vision-language model, see :class:`tta.TwoTowers`; no gradient. An image enters the caches before it is predicted. The
    factor of the cosines is the model's own (100 in the released code, as in OpenAI's CLIP). With 33 classes or fewer a
    probability of ``mask_lower`` is below that of chance, so that very unsure images speak against every class alike.
    """

    config: TDAConfig

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self._next(Evidence.of(image, self.config.selection)) for image in self.seen(x)])

    def _next(self, image: Evidence) -> Tensor:
        self.admit(image)
        return self.corrected(image)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits corrected by the present caches, which the images do not enter."""
        seen = self.seen(x, self.copied_generator())
        return torch.stack([self.corrected(Evidence.of(image, self.config.selection)) for image in seen])
