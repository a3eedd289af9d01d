"""Parity with the released code of COME, PeTTA and TRIBE; settings and bounds in golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tta
from tta import functional
from tta.methods import tribe

FOLDER = Path(__file__).parent / "golden"
LOGITS = {
    key: torch.from_numpy(values)
    for name in ("come", "petta", "tribe")
    for key, values in np.load(FOLDER / f"{name}.npz").items()
}


def roll(x):
    return torch.roll(x, 1, 3)


CE = {"loss_func": "ce", "regularizer": "l2"}
# key -> method, settings, the largest difference allowed
ROWS = {
    "tent_come": (("tent", {"lr": 5e-3, "loss": "come"}), 1e-3),
    "eata_come": (("eata", {"lr": 0.05, "fisher_alpha": 0.0, "loss": "come"}), 1e-3),
    "sar_come": (("sar", {"lr": 0.05, "reset_constant": 0.2, "loss": "come"}), 1e-3),
    "petta": (("petta", {"alpha_0": 0.05, "augment": roll}), 5e-5),
    "petta_ce": (("petta", {"alpha_0": 0.5, "lr": 3e-3, "bn_momentum": 0.1, "augment": roll, **CE}), 5e-5),
    "tribe": (("tribe", {"augment": roll}), 5e-5),
    "tribe_gamma": (
        ("tribe", {"eta": 0.3, "gamma": 0.3, "h0": 0.2, "lambda_": 2.0, "lr": 1e-2, "augment": roll}),
        2e-3,
    ),
}


@pytest.fixture
def runs(cnn, golden_images, golden_source):
    """``runs(key)`` is the run of a key that ``Parity.unlike`` takes; ``runs(key, 64)`` sees so many images."""

    def of(key, images=None, **changed):
        (method, settings), _ = ROWS[key]

        def run(noisy):
            adapter = tta.adapt(cnn, method, source=noisy(golden_source), **{**settings, **changed})
            return torch.cat([adapter(batch) for batch in noisy(golden_images[:images]).split(64)])

        return run

    return of


def bounds(key):
    return {"largest": ROWS[key][1], "median": 1e-4}


@pytest.mark.parametrize("key", ROWS)
def test_logits_equal_the_released_code(key, runs, parity):
    assert not parity.unlike(runs(key), LOGITS[key], **bounds(key))


def with_free_length(monkeypatch):
    """COME whose logits may grow."""

    def free(logits):
        rest = torch.full_like(logits[:, :1], logits.shape[1]).log()
        return functional.entropy(torch.cat([logits, rest], dim=1))

    monkeypatch.setitem(functional.ENTROPIES, "come", free)


def with_constant_statistics(monkeypatch):
    """TRIBE without gradients through the statistics."""
    taken_in = tribe.BalancedBatchNorm._taken_in
    monkeypatch.setattr(
        tribe.BalancedBatchNorm, "_taken_in", lambda *args: tuple(value.detach() for value in taken_in(*args))
    )


STEP = {"ascends": -1, "stands_still": 0}
COME = {**STEP, "plain_entropy": {"loss": "entropy"}, "length_not_held": with_free_length}
# key -> images it takes, and wrong variants by name: what the rule must not let pass
MUTANTS = {
    "tent_come": (128, COME),
    "eata_come": (128, {**COME, "all_samples": {"e_margin": 10.0}}),
    "sar_come": (128, {**COME, "not_sharpness_aware": {"rho": 1e-9}}),
    "petta": (
        384,
        {
            **STEP,
            "without_anchor": {"anchor_weight": 0.0},
            "without_regulariser": {"lambda_0": 0.0},
            "always_held": {"adaptive_lambda": False},
            "teacher_never_slower": {"adaptive_alpha": False},
            "features_stand_still": {"nu": 0.0},
        },
    ),
    "petta_ce": (
        384,
        {
            **STEP,
            "without_anchor": {"anchor_weight": 0.0},
            "without_regulariser": {"lambda_0": 0.0},
            "memory_taken_too": {"loss_func": "sce"},
        },
    ),
    "tribe": (384, {**STEP, "all_samples": {"h0": 1.0}, "without_anchor": {"lambda_": 0.0}}),
    "tribe_gamma": (
        192,
        {
            **STEP,
            "without_anchor": {"lambda_": 0.0},
            "classes_alone": {"gamma": 0.0},
            "small_weights": {"eta": 0.1},
            "statistics_constant": with_constant_statistics,
        },
    ),
}


@pytest.mark.slow
def test_a_wrong_variant_is_not_equal(key, images, change, runs, mutated, parity):
    assert parity.unlike(runs(key, images, **mutated(change)), LOGITS[key][:images], **bounds(key))


def test_every_key_has_a_wrong_variant():
    assert MUTANTS.keys() == ROWS.keys()
