"""Numbers: images with numbers to regress, as datasets of a user's own."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tta import fingerprint
from tta.datasets.domains import DatasetImages
from tta.labels import UNKNOWN


class DatasetNumbers(DatasetImages):
    """A user's own dataset of ``(image, numbers)`` as a domain: one number an image or several, NaN where unknown.

    Numbers are read from the samples, once; of a ``TensorDataset`` from its second tensor.

    Args:
        name: of the domain.
        dataset: has ``__len__`` and ``__getitem__``.
    """

    task = "regression"

    def __init__(self, name: str, dataset: Dataset[Any]) -> None:
        super().__init__(name, dataset)
        self._numbers: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """Unknown, int64 (n,): an image has no class."""
        return torch.full((len(self.dataset),), UNKNOWN)

    @property
    def numbers(self) -> Tensor:
        """Numbers of all images, float32 (n, values).

        Raises:
            ValueError: not as many numbers for each image; the message names the domain.
        """
        if self._numbers is None:
            if isinstance(self.dataset, TensorDataset) and len(self.dataset.tensors) > 1:
                found = self.dataset.tensors[1].float()
            else:
                found = self._stacked([self._sample(position)[1] for position in range(len(self.dataset))])
            if found.dim() not in (1, 2):
                raise ValueError(
                    f"Domain '{self.name}': the targets of all images have shape {tuple(found.shape)}; expected (images,) or "
                    "(images, values)."
                )
            self._numbers = found.reshape(len(found), -1)
        return self._numbers

    def targets(self, positions: Tensor) -> Tensor:
        """Numbers of the images at these positions, float32 (n, values)."""
        return self.numbers[positions]

    def describe(self) -> dict[str, Any]:
        """The manifest entry: the dataset's class and a hash over all images and numbers."""
        every = ((str(position), self._image(position)) for position in range(len(self.dataset)))
        return {"origin": self.origin, "content": fingerprint.of_tensors((*every, ("numbers", self.numbers)))}

    def _stacked(self, targets: list[Any]) -> Tensor:
        try:
            return torch.stack([torch.as_tensor(target, dtype=torch.float32) for target in targets])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Domain '{self.name}': expected as many numbers for each image ({error}). Give NaN where one is unknown."
            ) from None

    def _check_label(self, position: int, label: Any) -> None:
        """Numbers are read once, from the samples themselves."""
