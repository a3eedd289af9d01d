"""Parity with what the code of the field computes on the golden stream; settings and noise in golden/community/settings.md."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tta

FOLDER = Path(__file__).parent / "golden" / "community"
LOGITS = np.load(FOLDER / "logits.npz")
AUX = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / "aux.npz").items()}
# key -> how much rounding alone moves its values: the last column of the table
NOISE = {
    row[0]: float(row[-1])
    for line in (FOLDER / "settings.md").read_text().splitlines()
    if (row := [cell.strip() for cell in line.strip("|").split("|")])[0] in LOGITS.files
}

ETA = {"optimizer": "sgd", "e_margin": 0.4 * math.log(10), "d_margin": 0.4}
DEYO = {"optimizer": "sgd", "lr": 0.02}
SELF_TRAINING = {"optimizer": "adam", "lr": 1e-2, "batch_size": 64}
ROID = {**SELF_TRAINING, "momentum_src": 0.9}
CMF = {**SELF_TRAINING, "alpha": 0.9, "gamma": 0.9, "q": 4.0}
WHOLE = {"augment": "none", "prior_correction": "logits"}
PLAIN = {"use_consistency": False, "prior_correction": "none"}
RMT = {"optimizer": "sgd", "lr": 1e-3, "mt_alpha": 0.95, "augment": "none"}


def reordered(permutations):
    """Shuffles 4 x 4 patches as the reference drew it, batch after batch; rows of samples that it dropped are -1."""
    orders = itertools.cycle(permutations.long())

    def shuffle(x):
        order = next(orders)
        order = order[order[:, 0] >= 0]
        patches = x.unflatten(3, (4, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        patches = patches[torch.arange(len(x))[:, None], order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5)
        return patches.flatten(4, 5).flatten(2, 3)

    return shuffle


def projector(name):
    """The projector that a key starts from."""
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    names = {f"{layer}.{kind}": AUX[f"{name}_proj{layer}_{kind[0]}"] for layer in (0, 2) for kind in ("weight", "bias")}
    layers.load_state_dict(names)
    return {"projector": layers, "source_labels": True}


ROWS = {
    "bn_alpha01": ("norm", {"alpha": 0.1}),
    "bn_prior_16_80": ("norm", {"alpha": 0.8}),
    "cmf": ("cmf", {**CMF, **WHOLE}),
    "cmf_plain": ("cmf", {**CMF, **PLAIN}),
    "deyo_patch_reversed": ("deyo", {**DEYO, "augment": reordered(AUX["deyo_perms_reversed"])}),
    "deyo_patch_seeded": ("deyo", {**DEYO, "augment": reordered(AUX["deyo_perms_seeded"])}),
    "eta": ("eata", {**ETA, "lr": 0.05, "fisher_alpha": 0.0}),
    "rdumb": ("rdumb", {**ETA, "lr": 0.1, "reset_every": 5}),
    "rmt": ("rmt", {**RMT, **projector("rmt")}),
    "rmt_selftraining": ("rmt", {**RMT, "lambda_cont": 0.0}),
    "roid": ("roid", {**ROID, **WHOLE}),
    "roid_plain": ("roid", {**ROID, **PLAIN}),
    "rpl": ("rpl", {"optimizer": "sgd", "lr": 0.02}),
    "santa": ("santa", {"optimizer": "adam", "lr": 5e-3, "augment": "none", **projector("santa")}),
}


@pytest.fixture(scope="module")
def source(golden_source):
    """Batches of 64 with their labels."""
    labels = torch.from_numpy(np.load(FOLDER.parent / "stream.npz")["source_labels"]).long()
    return list(zip(golden_source.split(64), labels.split(64), strict=True))


@pytest.mark.parametrize("key", ROWS)
def test_logits_equal_the_reference(key, cnn, golden_images, source):
    method, hparams = ROWS[key]
    adapter = tta.adapt(cnn, method, source=source, **hparams)
    ours, theirs = torch.cat([adapter(batch) for batch in golden_images.split(64)]), torch.from_numpy(LOGITS[key])
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    assert (ours - theirs).abs().max() < 3 * NOISE[key]


@pytest.mark.parametrize("name", ["rmt", "santa"])
def test_prototypes_equal_the_reference(name, cnn, source):
    adapter = tta.adapt(cnn, name, source=source, source_labels=True)
    torch.testing.assert_close(adapter.contrast.prototypes, AUX[f"{name}_prototypes"], rtol=1e-4, atol=1e-4)
