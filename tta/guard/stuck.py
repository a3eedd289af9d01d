"""Stuck inputs: a sensor that repeats one picture, such as a covered or frozen camera."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tta.distributed import ALONE, Workers
from tta.functional import plain_images

GRID = 4  # cells a side that an image is averaged to
SAMPLES = 32  # pixels a side that are looked at
SAME = 1 / 255  # largest difference of a cell between images that count as the same: one grey level
REPEATED = 8  # images in a row


class StuckInput:
    """Counts the last images that were all the same, over batches of any size.

    On the CPU the answer is about the present batch. On a GPU it is read one batch late, so as not to wait for the device;
    of several workers, who must decide alike, at once.

    Args:
        workers: whose batches are looked at together.
    """

    def __init__(self, workers: Workers = ALONE) -> None:
        self.workers = workers
        self.last: Tensor | None = None  # cells of the last image, (1, channels * GRID * GRID)
        self.run: Tensor | None = None  # images at the end that are the same, an int64 scalar
        self._seen = torch.zeros((), dtype=torch.int64)

    def look(self, x: Tensor) -> bool:
        """Whether the stream is stuck. ``x`` is a batch of images (batch, channels, height, width)."""
        x = plain_images(x)
        step = [max(1, side // SAMPLES) for side in x.shape[-2:]]
        cells = adaptive_avg_pool2d(x[..., :: step[0], :: step[1]].float(), GRID).flatten(1)
        cells, _ = self.workers.gathered(cells)
        images = len(cells)
        if self.last is None or self.run is None or self.last.shape[1] != cells.shape[1]:
            self.last, self.run = cells[:1] + 2 * SAME, x.new_zeros((), dtype=torch.int64)
        before = torch.cat([self.last.to(cells), cells[:-1]])
        differs = (cells - before).abs().amax(1) > SAME
        places = torch.arange(1, images + 1, device=x.device)
        first = torch.where(differs, places, 0).amax()  # place of the last image that differs from the one before it
        self.run = torch.where(first > 0, images - first + 1, self.run + images)
        self.last = cells[-1:].clone()
        if x.device.type == "cpu" or self.workers.size > 1:
            return bool(self.run >= REPEATED)
        stuck = bool(self._seen >= REPEATED)
        if x.is_cuda and not self._seen.is_pinned():
            self._seen = self._seen.pin_memory()
        self._seen.copy_(self.run, non_blocking=True)
        return stuck
