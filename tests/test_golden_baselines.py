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
from tta.methods import lame, shot, t3a

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
    "memo_rolled": ("cnn", "memo", {**MEMO, "prior": None, "views": 8, "augment": rolled}, 2.5e-3),
    "memo_rolled_bn16": ("cnn", "memo", {**MEMO, "views": 8, "augment": rolled}, 1.1e-3),
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


@pytest.fixture
def runs(request, golden_images, golden_source, aux):
    """``runs(key)`` is the run of a key that ``Parity.unlike`` takes; ``runs(key, 64)`` sees so many images."""

    def of(key, images=None, **changed):
        model, method, hparams, _ = ROWS[key]
        hparams = {**hparams, **changed}
        if key == "foa":
            hparams["initial_prompts"] = aux("foa_prompts_init").view(1, 3, 64)
        network = request.getfixturevalue(model)

        def run(noisy):
            stream = noisy(golden_images[part(key)][:images])
            new = {"augment": rolled()} if hparams.get("augment") is rolled else {}
            adapter = tta.adapt(network, method, source=noisy(golden_source), **{**hparams, **new})
            if key == "foa":
                draws = np.random.RandomState(2020)  # the released code's own, in place of the adapter's
                adapter._normals = lambda: torch.from_numpy(draws.randn(27, 192))
            if key in ("note", "note_pbrs_bn"):
                adapter.memory = ScriptedMemory(stream, aux(f"{key}_memory_ids").long())
            ours = torch.cat([adapter(batch) for batch in stream.split(64)])
            return ours.exp() if method == PROBABILITIES else ours

        return run

    return of


def part(key):
    """MEMO predicts each image on its own: a sixth of them will do."""
    return slice(None, None, 6 if ROWS[key][1] == "memo" else 1)


SLOW = ("foa",)  # a population of 27 forwards per batch
KEYS = [pytest.param(key, marks=pytest.mark.slow if key in SLOW else ()) for key in ROWS]
# Whether an image is the fifth or the sixth neighbour of another, and MEMO's steps on each image, come before any output.
AT_ONCE = {"lame_knn5", "lame_knn5_vit", "memo_same", "memo_rolled", "memo_rolled_bn16"}


def bounds(key):
    return {"largest": 3 * ROWS[key][-1], "at_once": key in AT_ONCE}


@pytest.mark.parametrize("key", KEYS)
def test_logits_equal_the_released_code(key, runs, parity, logits):
    assert not parity.unlike(runs(key), torch.from_numpy(logits[key])[part(key)], **bounds(key))


def repelled(monkeypatch):
    """Neighbours push an image's prediction away from their own."""
    optimise = lame._laplacian_optimisation
    monkeypatch.setattr(lame, "_laplacian_optimisation", lambda unary, affinity: optimise(unary, -affinity))


def least_sure(monkeypatch):
    """Of the highest entropy in place of the lowest."""
    entropy = t3a.entropy
    monkeypatch.setattr(t3a, "entropy", lambda logits: -entropy(logits))


def without_diversity(monkeypatch):
    monkeypatch.setattr(shot, "_diversity", lambda logits: 0 * logits.sum())


STEP = {"ascends": -1, "stands_still": 0}
SHOT = {**STEP, "without_diversity": without_diversity}
# key -> images it takes, and wrong variants by name: what the rule must not let pass
MUTANTS = {
    "lame_knn5": (128, {"repelled": repelled, "four_neighbours": {"knn": 4}, "symmetric": {"symmetric": True}}),
    "lame_rbf5": (128, {"repelled": repelled, "four_neighbours": {"knn": 4}}),
    "lame_linear": (128, {"repelled": repelled}),
    "lame_knn5_vit": (128, {"repelled": repelled, "four_neighbours": {"knn": 4}, "symmetric": {"symmetric": True}}),
    "t3a": (256, {"least_sure": least_sure, "a_support_fewer": {"filter_k": 19}}),
    "t3a_vit": (256, {"least_sure": least_sure, "a_support_fewer": {"filter_k": 19}}),
    "shot_im_t3a": (128, SHOT),
    "shot_im_lame": (128, SHOT),
    "shot_im_ttab": (128, {**SHOT, "no_nesterov": {"nesterov": False}}),
    "pl_lame": (128, {**STEP, "all_samples": {"threshold": 0.0}}),
    "pl_t3a": (128, {**STEP, "all_samples": {"threshold": 0.0}}),
    "plclf_t3a": (128, {**STEP, "all_samples": {"threshold": 0.0}}),
    "pl_note": (128, STEP),
    "conjugate_hard_pl_pre": (128, {**STEP, "all_samples": {"threshold": 0.0}}),
    "conjugate_pre": (128, {**STEP, "without_poly_term": {"epsilon": 0.0}}),
    "conjugate_post": (128, {**STEP, "without_poly_term": {"epsilon": 0.0}}),
    "note": (128, {**STEP, "statistics_stand_still": {"bn_momentum": 0.0}, "plain_normalisation": {"iabn": False}}),
    "note_iabn_only": (64, {"plain_normalisation": {"iabn": False}, "three_standard_errors": {"k": 3.0}}),
    "note_pbrs_bn": (128, {**STEP, "statistics_stand_still": {"bn_momentum": 0.0}}),
    "memo_same": (16, STEP),
    "memo_rolled": (16, {**STEP, "a_view_fewer": {"views": 7}}),
    "memo_rolled_bn16": (16, {**STEP, "source_statistics": {"prior": None}}),
    "foa": (128, {"unshifted": {"gain": 0.0}, "entropy_alone": {"lambda_": 0.0}}),
    "foa_shift": (128, {"unshifted": {"gain": 0.0}, "shifted_away": {"gain": -1.0}}),
}


@pytest.mark.slow
def test_a_wrong_variant_is_not_equal(key, images, change, runs, mutated, parity, logits):
    theirs = torch.from_numpy(logits[key])[part(key)][:images]
    assert parity.unlike(runs(key, images, **mutated(change)), theirs, **bounds(key))


def test_every_key_has_a_wrong_variant():
    assert MUTANTS.keys() == ROWS.keys()
