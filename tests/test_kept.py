"""Without BatchNorm layers, the samples that a filter keeps are learned from alone: the result stays, the work is less."""

import pytest
import torch
from torch import nn

import tta
from tta.functional import entropy
from tta.methods import deyo, eata

ROWS = {
    "eata": (eata, "e_margin", {"fisher_alpha": 0.0, "d_margin": 1.0, "lr": 0.2}),
    "deyo": (deyo, "margin", {"optimizer": "sgd", "lr": 0.2, "augment": "occ", "plpd_threshold": -1.0}),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ]
    model = nn.Sequential(*layers).eval()
    return model


@pytest.mark.parametrize("method", ROWS)
def test_what_is_kept_is_learned_from_alone(method, model, monkeypatch):
    module, margin, settings = ROWS[method]
    batches = torch.rand(6, 24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings[margin] = float(entropy(model(batches[0])).quantile(0.3))
    counts = []

    def logits():
        adapter = tta.adapt(model, method, **settings)
        adapter.model.register_full_backward_hook(lambda _, inputs, outputs: counts.append(len(outputs[0])))
        return torch.cat([adapter(x) for x in batches])

    alone = logits()
    assert min(counts) <= 8
    monkeypatch.setattr(module, "alone", lambda *_: None)
    counts.clear()
    together = logits()
    assert set(counts) == {24}
    assert (together[:24] - together[-24:]).abs().max() > 0.01
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
