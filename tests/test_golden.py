"""Parity: the same settings give the logits that the papers' released code computed."""

import math

import pytest
import torch

import tta


def roll(x):
    return torch.roll(x, 1, 3)


ROWS = {
    "source": ("cnn", "source", {}, "never"),
    "source_vit": ("vit", "source", {}, "never"),
    "norm": ("cnn", "norm", {}, "never"),
    "tent": ("cnn", "tent", {"optimizer": "adam", "lr": 5e-3}, "never"),
    "tent_steps3": ("cnn", "tent", {"optimizer": "adam", "lr": 5e-3, "steps": 3}, "never"),
    "sar": ("cnn", "sar", {"lr": 0.05, "margin_e0": 0.4 * math.log(10), "reset_constant": 0.2}, "never"),
    "cotta": ("cnn", "cotta", {"mt_alpha": 0.99, "rst_m": 0.0, "ap": 0.85, "views": 2, "augment": roll}, "never"),
    "rotta": ("cnn", "rotta", {"augment": "none"}, "never"),
    "tent_episodic": ("cnn", "tent", {"optimizer": "adam", "lr": 1e-2, "steps": 2}, "batch"),
}


LARGEST = {"cotta": 5e-3}  # of the differences, where it is not 5e-4


@pytest.mark.parametrize("key", ROWS)
def test_logits_equal_the_released_code(key, request, golden_images, golden_logits):
    model, method, hparams, reset = ROWS[key]
    adapter = tta.adapt(request.getfixturevalue(model), method, **hparams)
    parts = []
    for batch in golden_images.split(64):
        if reset == "batch":
            adapter.reset()
        parts.append(adapter(batch))
    ours, theirs = torch.cat(parts), golden_logits(key)
    difference = (ours - theirs).abs()
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.995
    assert difference.median() < 1e-4
    assert difference.max() < LARGEST.get(key, 5e-4)
