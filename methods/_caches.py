"""A cache of features for each class, of fixed size."""

import torch
from torch import Tensor, nn

from tta.functional import matmul


class Cache(nn.Module):
    """Unit features that images were predicted by, a few for each class, the surest first.

    Args:
        classes: number of classes.
        places: features kept for each class; 0 for a cache that stays empty.
        width: of a feature.
        masked: whether an entry speaks against a set of classes, and not for its own.
        fifo: keep the newest entries, not the surest.
    """

    keys: Tensor  # (classes, places, width), zeros in an empty place
    entropies: Tensor  # (classes, places), infinite in an empty place
    masks: Tensor  # (classes, places, classes)

    def __init__(self, classes: int, places: int, width: int, *, masked: bool = False, fifo: bool = False) -> None:
        super().__init__()
        self.fifo = fifo
        self.register_buffer("keys", torch.zeros(classes, places, width))
        self.register_buffer("entropies", torch.full((classes, places), torch.inf))
        self.register_buffer("masks", torch.zeros(classes, places, classes, dtype=torch.bool) if masked else None)

    def admit(
        self, label: Tensor, feature: Tensor, uncertainty: Tensor, when: Tensor, mask: Tensor | None = None
    ) -> None:
        """Give a feature a place in a class; the last of a full class goes, be it the newcomer itself.

        Args:
            label: the class, a scalar.
            feature: (width,).
            uncertainty: its entropy, a scalar.
            when: a boolean scalar; if it is false nothing happens. On a GPU nothing waits for it, nor for the label.
            mask: (classes,), the classes that the entry speaks against.
        """
        places = self.entropies.shape[1]
        if not places:
            return
        row = label.view(1)  # a scalar as an index would be read on the host
        entropies = self._joined(self.entropies[row][0], uncertainty)
        order = entropies.argsort(stable=True)
        kept = (torch.arange(places, device=order.device) if self.fifo else order[:places]), when, row
        self._keep(self.entropies, entropies, *kept)
        self._keep(self.keys, self._joined(self.keys[row][0], feature), *kept)
        if mask is not None:
            self._keep(self.masks, self._joined(self.masks[row][0], mask), *kept)

    def _joined(self, entries: Tensor, newcomer: Tensor) -> Tensor:
        newest = newcomer.to(entries.dtype)[None]
        return torch.cat([newest, entries] if self.fifo else [entries, newest])

    @staticmethod
    def _keep(of_all: Tensor, joined: Tensor, order: Tensor, when: Tensor, row: Tensor) -> None:
        of_all[row] = torch.where(when, joined[order], of_all[row])

    def affinity(self, feature: Tensor, beta: float) -> Tensor:
        """exp(-beta (1 - cosine)) of a feature with each entry, (classes, places); zero in an empty place."""
        near = (-beta * (1 - matmul(self.keys, feature))).exp()
        return torch.where(self.entropies.isfinite(), near, 0)
