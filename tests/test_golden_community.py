"""Parity with what the code of the field computes on the golden stream; settings and noise in golden/community/settings.md."""

import itertools
import math
from functools import partial
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
        order = order[torch.arange(len(x)) % len(order)]  # all, unless a wrong variant asks for more or fewer
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
    "deyo_patch_reversed": ("deyo", {**DEYO, "augment": partial(reordered, AUX["deyo_perms_reversed"])}),
    "deyo_patch_seeded": ("deyo", {**DEYO, "augment": partial(reordered, AUX["deyo_perms_seeded"])}),
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


@pytest.fixture
def runs(cnn, golden_images, source):
    """``runs(key)`` is the run of a key that ``Parity.unlike`` takes; ``runs(key, 64)`` sees so many images."""

    def of(key, images=None, **changed):
        method, hparams = ROWS[key]
        hparams = {**hparams, **changed}

        def run(noisy):
            new = {name: value() if isinstance(value, partial) else value for name, value in hparams.items()}
            batches = [(noisy(batch), labels) for batch, labels in source]
            adapter = tta.adapt(cnn, method, source=batches, **new)
            return torch.cat([adapter(batch) for batch in noisy(golden_images[:images]).split(64)])

        return run

    return of


@pytest.mark.parametrize("key", ROWS)
def test_logits_equal_the_reference(key, runs, parity):
    assert not parity.unlike(runs(key), torch.from_numpy(LOGITS[key]), largest=3 * NOISE[key])


STEP = {"ascends": -1, "stands_still": 0}
# key -> images it takes, and wrong variants by name: what the rule must not let pass
MUTANTS = {
    "bn_alpha01": (64, {"a_tenth_more_of_the_batch": {"alpha": 0.11}, "no_batch": {"alpha": 0.0}}),
    "bn_prior_16_80": (64, {"batch_alone": {"alpha": 1.0}}),
    "cmf": (128, {**STEP, "not_drawn_back": {"gamma": 1.0}, "all_alike": {"use_weighting": False}}),
    "cmf_plain": (128, {**STEP, "not_drawn_back": {"gamma": 1.0}, "all_alike": {"use_weighting": False}}),
    "deyo_patch_reversed": (128, {**STEP, "no_entropy_weight": {"reweight_ent": False}}),
    "deyo_patch_seeded": (128, {**STEP, "no_confidence_weight": {"reweight_plpd": False}}),
    "eta": (128, {**STEP, "all_samples": {"e_margin": 10.0}}),
    "rdumb": (384, {"ascends": -1, "never_resets": {"reset_every": 1000}}),
    "rmt": (128, {**STEP, "without_contrast": {"lambda_cont": 0.0}}),
    "rmt_selftraining": (192, {**STEP, "teacher_stands_still": {"mt_alpha": 1.0}}),
    "roid": (128, {**STEP, "source_forgotten": {"momentum_src": 1.0}, "without_prior": {"prior_correction": "none"}}),
    "roid_plain": (128, {**STEP, "source_forgotten": {"momentum_src": 1.0}, "all_alike": {"use_weighting": False}}),
    "rpl": (128, {**STEP, "plain_cross_entropy": {"q": 0.01}}),
    "santa": (128, {**STEP, "without_contrast": {"lambda_cont": 0.0}}),
}


@pytest.mark.slow
def test_a_wrong_variant_is_not_equal(key, images, change, runs, mutated, parity):
    theirs = torch.from_numpy(LOGITS[key])[:images]
    assert parity.unlike(runs(key, images, **mutated(change)), theirs, largest=3 * NOISE[key])


def test_every_key_has_a_wrong_variant():
    assert MUTANTS.keys() == ROWS.keys()


@pytest.mark.parametrize("name", ["rmt", "santa"])
def test_prototypes_equal_the_reference(name, cnn, source):
    adapter = tta.adapt(cnn, name, source=source, source_labels=True)
    torch.testing.assert_close(adapter.contrast.prototypes, AUX[f"{name}_prototypes"], rtol=1e-4, atol=1e-4)
