"""Parity of the baselines with community implementations: the same settings give the same logits.

Settings, and what was replaced around the released code, are in ``golden/community/settings.md``, key by key.
"""

from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tta

COMMUNITY = Path(__file__).parent / "golden" / "community"
ROLLS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (2, 0)]


def rolled():
    """The views of MEMO's keys, one a call: the image rolled by fixed rows and columns."""
    rolls = cycle(ROLLS)
    return lambda image: torch.roll(image, next(rolls), (2, 3))


BATCH_PL = {"threshold": 0.9, "statistics": "source"}
LAME_SGD = {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.0,
    "weight_decay": 1e-4,
    "statistics": "mixed",
    "score": "after",
}
MEMO = {"lr": 1e-4, "augment": "none"}
NOTE = {"lr": 1e-3}

# key -> model, method, hyper-parameters, largest change that input noise of 1e-6 makes (settings.md)
ROWS = {
    "lame_knn5": ("cnn", "lame", {"affinity": "knn"}, 5.9e-6),
    "lame_rbf5": ("cnn", "lame", {}, 2.1e-5),
    "lame_linear": ("cnn", "lame", {"affinity": "linear"}, 1e-6),  # its values are 0 and 1
    "lame_knn5_vit": ("vit", "lame", {"affinity": "knn"}, 2.9e-5),
    "t3a": ("cnn", "t3a", {}, 1.6e-5),
    "t3a_vit": ("vit", "t3a", {}, 5.9e-5),
    "shot_im_t3a": ("cnn", "shot", {"optimizer": "adam", "lr": 2e-4, "statistics": "source"}, 1.7e-3),
    "shot_im_lame": ("cnn", "shot", {**LAME_SGD, "parameters": "norm"}, 2.8e-4),
    "shot_im_ttab": ("cnn", "shot", {"lr": 1e-3, "nesterov": True}, 1.9e-3),
    "pl_lame": ("cnn", "pl", {**LAME_SGD, "threshold": 0.9}, 1.2e-4),
    "pl_t3a": ("cnn", "pl", {**BATCH_PL, "lr": 1e-4, "parameters": "all"}, 3.5e-4),
    "plclf_t3a": ("cnn", "pl", {**BATCH_PL, "lr": 1e-2, "parameters": "head"}, 1.6e-4),
    "pl_note": ("cnn", "pl", {"lr": 2e-3}, 1.7e-4),
    "conjugate_hard_pl_pre": ("cnn", "pl", {"lr": 5e-3, "threshold": 0.75}, 5.5e-4),
    "conjugate_pre": ("cnn", "conjugate_pl", {"lr": 2e-3}, 1.4e-4),
    "conjugate_post": ("cnn", "conjugate_pl", {"lr": 2e-3, "score": "after"}, 1.5e-4),
    "note": ("cnn", "note", NOTE, 1.1e-4),
    "note_iabn_only": ("cnn", "note", {**NOTE, "update_frequency": 1000}, 2.3e-5),
    "note_pbrs_bn": ("cnn", "note", {**NOTE, "iabn": False, "bn_momentum": 0.05}, 1.4e-4),
    "memo_same": ("cnn", "memo", {**MEMO, "prior": None}, 1.4e-3),
    "memo_rolled": ("cnn", "memo", {**MEMO, "prior": None, "views": 8, "augment": rolled()}, 2.5e-3),
    "memo_rolled_bn16": ("cnn", "memo", {**MEMO, "views": 8, "augment": rolled()}, 1.1e-3),
    "foa": ("vit", "foa", {}, 4.7e-5),
    "foa_shift": ("vit", "foa", {"num_prompts": 0}, 3.4e-5),
}
PROBABILITIES = "lame"  # returned by the released code; here their logarithms


class ScriptedMemory(nn.Module):
    """In place of NOTE's memory: holds the samples that the released code's random reservoir held."""

    def __init__(self, images, held):
        super().__init__()
        self.images, self.held, self.offered = images, held, 0

    def add(self, samples, labels, classes, draw):
        assert torch.equal(samples, self.images[self.offered : self.offered + len(samples)])
        self.offered += len(samples)

    def contents(self):
        return self.images[self.held[self.offered // 64 - 1]]


@pytest.fixture(scope="module")
def logits():
    return np.load(COMMUNITY / "logits.npz")


@pytest.fixture(scope="module")
def aux():
    arrays = np.load(COMMUNITY / "aux.npz")
    return lambda name: torch.from_numpy(arrays[name])


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.slow if key == "foa" else ()) for key in ROWS])
def test_logits_equal_the_released_code(key, request, golden_images, golden_source, logits, aux):
    model, method, hparams, noise = ROWS[key]
    if key == "foa":
        hparams = {"initial_prompts": aux("foa_prompts_init").view(1, 3, 64)}
    adapter = tta.adapt(request.getfixturevalue(model), method, source=golden_source, **hparams)
    if key == "foa":
        draws = np.random.RandomState(2020)  # the released code's own, in place of the adapter's
        adapter._normals = lambda: torch.from_numpy(draws.randn(27, 192))
    if key in ("note", "note_pbrs_bn"):
        adapter.memory = ScriptedMemory(golden_images, aux(f"{key}_memory_ids").long())
    # MEMO predicts each image on its own: a sixth of them will do.
    part = slice(None, None, 6 if method == "memo" else 1)
    theirs = torch.from_numpy(logits[key])[part]
    ours = torch.cat([adapter(batch) for batch in golden_images[part].split(64)])
    ours = ours.exp() if method == PROBABILITIES else ours
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    assert (ours - theirs).abs().max() < 3 * noise
