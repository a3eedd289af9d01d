"""Parity of regression: the same settings give the numbers that the released code of SSA computed, see golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tta

FILE = Path(__file__).parent / "golden" / "regression.npz"
# key -> method, hyper-parameters; batches of 64 in order, never reset
ROWS = {
    "regression_source": ("source", {}),
    "regression_norm": ("norm", {}),
    "regression_ssa": ("ssa", {"components": 10}),
}
LARGEST = 1e-4  # difference of any number, which are of 0 to 9; 5e-6 seen


@pytest.fixture
def unlike(cnn, golden_images, golden_source):
    """``unlike(key, images)`` is the difference of a run to the released code's, as a sentence; empty if they are equal."""
    golden = np.load(FILE)
    cnn.fc = nn.Linear(64, 1)
    with torch.no_grad():
        cnn.fc.weight.copy_(torch.from_numpy(golden["weight"])[None])
        cnn.fc.bias.fill_(float(golden["bias"]))

    def of(key, count=None, **changed):
        method, hparams = ROWS[key]
        adapter = tta.adapt(cnn.eval(), method, source=golden_source, task="regression", **{**hparams, **changed})
        found = torch.cat([adapter(batch) for batch in golden_images[:count].split(64)])[:, 0]
        largest = (found - torch.from_numpy(golden[key.removeprefix("regression_")])[:count]).abs().max()
        return "" if largest <= LARGEST else f"a number differs by {largest:.1e}, above {LARGEST:.0e}"

    return of


@pytest.mark.parametrize("key", ROWS)
def test_logits_equal_the_released_code(key, unlike):
    assert not unlike(key)


def without_bias(monkeypatch):
    predict = tta.Adapter.predict
    monkeypatch.setattr(tta.Adapter, "predict", lambda self, x: predict(self, x) - self.model.fc.bias)


# key -> images it takes, and wrong variants by name: what the rule must not let pass
MUTANTS = {
    "regression_source": (64, {"without_bias": without_bias}),
    "regression_norm": (64, {"unbiased_variance": {"alpha": 1 - 1e-6}, "blend": {"alpha": 0.99}}),
    "regression_ssa": (
        256,
        {
            "ascends": -1,
            "stands_still": 0,
            "unweighted": {"weight_bias": 1e3},
            "a_direction_fewer": {"components": 9},
            "by_source": {"statistics": "source"},
            "all_weights": {"parameters": "features"},
            "two_steps": {"steps": 2},
        },
    ),
}


@pytest.mark.slow
def test_a_wrong_variant_is_not_equal(key, images, change, unlike, mutated):
    assert unlike(key, images, **mutated(change))


def test_every_key_has_a_wrong_variant():
    assert MUTANTS.keys() == ROWS.keys()
