"""Parity with the released code of the methods for correlated and noisy streams; settings in golden/README.md."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import tta
from tta.methods import delta, unmix_tns
from tta.methods.unmix_tns import UnMixTNS

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = {
    key: torch.from_numpy(value)
    for name in ("unmix_tns", "delta", "sotta")
    for key, value in np.load(GOLDEN / f"{name}.npz").items()
}
SMALL = {"lr": 1e-2, "update_frequency": 32, "memory_size": 16, "high_threshold": 0.66}
# key -> method, hyper-parameters, how far noise of 1e-7 in the images moves the released code's logits (golden/README.md)
ROWS = {
    "unmix_tns": ("unmix_tns", {}, 7e-6),
    "unmix_tns_k4": ("unmix_tns", {"components": 4, "full_batch": 16}, 3e-6),
    "delta": ("delta", {"lr": 5e-3}, 8e-4),
    "delta_entw": ("delta", {"loss": "weighted", "optimizer": "sgd", "lr": 0.05, "old_prior": 0.8, "dot": 0.9}, 2e-3),
    "delta_pl": ("delta", {"loss": "pseudo", "lr": 5e-3, "old_prior": 0.5}, 5e-4),
    "sotta": ("sotta", {"high_threshold": 0.99}, 4e-5),
    "sotta_small": ("sotta", SMALL, 2e-5),
}


def adapted(key, network, monkeypatch, **changed):
    """An adapter with the released code's random draws in place of its own."""
    method, hparams, _ = ROWS[key]
    if method == "unmix_tns":
        draws = iter([ARRAYS[f"{key}_draws_{layer}"] for layer in range(7)])
        monkeypatch.setattr(UnMixTNS, "_draws", lambda *_: next(draws))
    adapter = tta.adapt(network, method, **{**hparams, **changed})
    if method == "sotta":
        adapter._draw = random.Random(0).randrange
    return adapter


@pytest.fixture
def runs(cnn, golden_images, monkeypatch):
    """``runs(key)`` is the run of a key that ``Parity.unlike`` takes; ``runs(key, 64)`` sees so many images."""

    def of(key, images=None, **changed):
        def run(noisy):
            adapter = adapted(key, cnn, monkeypatch, **changed)
            return torch.cat([adapter(batch) for batch in noisy(golden_images[:images]).split(64)])

        return run

    return of


def bounds(key):
    return {"largest": 3 * ROWS[key][-1], "agreeing": 0.995}


@pytest.mark.parametrize("key", ROWS)
def test_logits_equal_the_released_code(key, runs, parity):
    assert not parity.unlike(runs(key), ARRAYS[key], **bounds(key))


def other(module, name, value):
    """A wrong variant: another value of a constant of the method."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, value)


def without_gradient_of_statistics(monkeypatch):
    """As if the moving averages alone normalised: the values are the same."""
    var_mean = torch.var_mean
    monkeypatch.setattr(
        delta.torch, "var_mean", lambda *args, **kwargs: [v.detach() for v in var_mean(*args, **kwargs)]
    )


STEP = {"ascends": -1, "stands_still": 0}
COMPONENTS = {
    "components_stand_still": {"full_batch": 10**9},
    "components_at_one_place": other(unmix_tns, "SPREAD", 0.1),
    "flatter_shares": other(unmix_tns, "TEMPERATURE", 0.08),
}
DELTA = {**STEP, "averages_stand_still": {"old_prior": 1.0}, "all_alike": {"dot": None}}
SOTTA = {
    **STEP,
    "statistics_stand_still": {"bn_momentum": 0.0},
    "not_sharpness_aware": {"rho": 1e-9},
    "all_samples": {"high_threshold": 0.0},
}
# key -> images it takes, and wrong variants by name: what the rule must not let pass
MUTANTS = {
    "unmix_tns": (192, COMPONENTS),
    "unmix_tns_k4": (192, COMPONENTS),
    "delta": (320, {**DELTA, "without_gradient_of_statistics": without_gradient_of_statistics}),
    "delta_entw": (320, {**DELTA, "unweighted": {"loss": "entropy"}}),
    "delta_pl": (448, {**DELTA, "entropy": {"loss": "entropy"}}),
    "sotta": (448, SOTTA),
    "sotta_small": (256, {**SOTTA, "larger_memory": {"memory_size": 20}}),
}


@pytest.mark.slow
def test_a_wrong_variant_is_not_equal(key, images, change, runs, mutated, parity):
    assert parity.unlike(runs(key, images, **mutated(change)), ARRAYS[key][:images], **bounds(key))


def test_every_key_has_a_wrong_variant():
    assert MUTANTS.keys() == ROWS.keys()


@pytest.mark.parametrize("key", ["sotta", "sotta_small"])
def test_the_memory_holds_what_the_released_memory_held(key, cnn, golden_images, monkeypatch):
    adapter = adapted(key, cnn, monkeypatch)
    every = adapter.config.update_frequency
    for batch, expected in zip(golden_images.split(every), ARRAYS[f"{key}_memory_ids"], strict=True):
        adapter(batch)
        held = adapter.memory.contents()
        same = (held[:, None] == golden_images).flatten(2).all(2)  # (held, images)
        assert same.int().argmax(1).sort().values.tolist() == expected[expected >= 0].sort().values.tolist()
