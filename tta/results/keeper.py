"""The keeping of some frames of a run, reduced, as they pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tta.results.frames import Frame
from tta.tasks import DETECTION, SEGMENTATION, Task

COUNT = 8  # frames kept of a run unless it says which
LONGEST = 384  # pixels of the longer side of a kept picture: as many as a figure shows


class _Kept(NamedTuple):
    """A frame whose tensors are still on the device."""

    position: int
    domain: Tensor
    scale: float
    image: Tensor
    truth: Tensor
    predicted: Tensor


def spread(order: Tensor, count: int = COUNT) -> list[int]:
    """The last sample of each domain, which a method has learned most before; of many domains, some at equal distances.

    Args:
        order: (samples, 2), see :attr:`tta.datasets.stream.Stream.order`.
        count: at most this many.

    Returns:
        Places in the stream, in order.
    """
    number = order[:, 0]
    last = [int(torch.nonzero(number == domain)[-1]) for domain in sorted(set(number.tolist()))]
    if len(last) > count:
        last = [last[place] for place in np.linspace(0, len(last) - 1, count).round().astype(int).tolist()]
    return sorted(last)


class FrameKeeper:
    """Keeps the chosen frames of a run as they pass; the others cost a comparison of two numbers.

    Args:
        positions: places in the stream.
    """

    def __init__(self, positions: Sequence[int] = ()) -> None:
        self.positions = sorted(set(positions))
        self._kept: list[_Kept] = []

    def add(self, first: int, images: Tensor, labels: Tensor, domain: Tensor, output: Any, task: Task) -> None:
        """Keep the chosen ones among consecutive samples of a run; does not wait for a GPU.

        Args:
            first: place of the first of them in the stream.
            images: (n, 3, rows, columns) in [0, 1].
            labels, domain: as of :class:`tta.datasets.stream.Batch`.
            output: of the adapter, for these images.
            task: whose outputs they are; only maps and boxes can be seen.
        """
        if task not in (SEGMENTATION, DETECTION):
            return
        for position in self.positions:
            if first <= position < first + len(images):
                at = position - first
                image, scale = _reduced(images[at])
                truth = predicted = torch.empty(0, 0)
                if task is SEGMENTATION:
                    truth = _nearest(labels[at], image.shape[1:])
                    predicted = _nearest(output[at].max(0).indices, image.shape[1:])
                self._kept.append(_Kept(position, domain[at], scale, image, truth, predicted))

    def frames(self) -> tuple[Frame, ...]:
        """Pictures kept, in stream order; waits for the device."""
        return tuple(map(_on_cpu, self._kept))


def _on_cpu(kept: _Kept) -> Frame:
    levels = (kept.image * 255).round().clamp(0, 255).to(torch.uint8)
    return Frame(
        position=kept.position,
        domain=int(kept.domain),
        scale=kept.scale,
        image=levels.permute(1, 2, 0).contiguous().cpu().numpy(),
        truth=kept.truth.to(torch.int16).cpu().numpy(),
        predicted=kept.predicted.to(torch.int16).cpu().numpy(),
    )


def _reduced(image: Tensor) -> tuple[Tensor, float]:
    """A picture whose longer side is at most :data:`LONGEST`, each pixel the mean of those it stands for, and its scale."""
    scale = min(1.0, LONGEST / max(image.shape[1:]))
    if scale == 1.0:
        return image.clone(), scale
    rows, columns = (max(1, round(side * scale)) for side in image.shape[1:])
    reduced = F.interpolate(image[None].float(), size=(rows, columns), mode="area")
    return reduced[0], scale


def _nearest(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask of another size, each pixel that of the nearest."""
    return F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0]
