"""Batches that are refused say why and leave no trace; adapters that never learn say so; lost states are given up."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import tta

METHODS = [name for name in tta.list_methods(task="classification", two_towers=False) if name not in ("dpcore", "foa")]
QUICK = {  # in place of defaults that are slow
    "clust3": {"steps": 2, "projectors": 2, "source_steps": 1},
    "cta": {"steps": 2, "source_steps": 1, "augment": "crop"},
    "ttt": {"copies": 2, "source_steps": 1},
    "ttt_mae": {"copies": 2, "source_steps": 1, "width": 4},
}


@pytest.fixture
def images():
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((2, 3, 32, 32)), r"got ndarray\. Pass a torch\.Tensor"),
        (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\)\. For a single image pass x\[None\]"),
        (torch.zeros(8), r"shape \(8,\)"),
        (torch.zeros(0, 3, 32, 32), "an empty batch"),
        (torch.zeros(2, 3, 0, 32), "images without pixels"),
        (torch.zeros(2, 32, 32, 3), r"looks like \(batch, height, width, channels\)\. Pass x\.permute"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"For uint8 images pass x\.float\(\) / 255"),
        (
            torch.zeros(2, 3, 32, 32, dtype=torch.float64),
            r"parameters are torch\.float32\. Pass x\.to\(torch\.float32\)",
        ),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float16), r"parameters are torch\.float32"),
        (torch.zeros(2, 3, 32, 32, device="meta"), r"on meta, where the adapter is on cpu"),
        (torch.zeros(2, 1, 32, 32), "of 3 channels for this model; got 1 channels"),
        (torch.full((2, 3, 32, 32), torch.nan), "2 of the 2 images hold NaN"),
    ],
)
def test_each_unfit_batch_has_a_sentence_and_leaves_no_trace(cnn, images, batch, message):
    adapter, other = tta.adapt(cnn, "tent"), tta.adapt(cnn, "tent")
    for seen in (0, 1):
        with pytest.raises(ValueError, match=message):
            adapter(batch)
        assert torch.equal(adapter(images), other(images)), seen


@pytest.mark.parametrize("method", METHODS)
def test_after_a_refused_batch_every_method_goes_on_as_before(cnn, images, method):
    source = [(images, torch.arange(16) % 10)]
    adapter, other = (tta.adapt(cnn, method, source=source, **QUICK.get(method, {})) for _ in range(2))
    with pytest.raises(ValueError, match=r"channels|of shape"):
        adapter(images[:, :1])
    assert torch.equal(adapter(images), other(images))
    with pytest.raises(ValueError, match=r"channels|of shape"):
        adapter(images[:, :2])
    assert torch.equal(adapter(images.flip(0)), other(images.flip(0)))


def test_the_users_graph_is_left_alone(cnn):
    layer, x = nn.Conv2d(3, 3, 1), torch.rand(4, 3, 32, 32, requires_grad=True)
    processed = layer(x)
    adapter = tta.adapt(cnn, "tent")
    adapter(x)
    adapter(processed)
    assert x.grad is None
    assert layer.weight.grad is None
    processed.sum().backward()  # the graph is still there


class Closed(nn.Module):
    """A classifier whose forward lets no gradient through."""

    def __init__(self, net, how):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.net(x)
        if self.how == "numpy":
            return torch.from_numpy(self.net(x).detach().numpy())
        return self.net(x).detach()


@pytest.mark.parametrize("how", ["no_grad", "detach", "numpy"])
@pytest.mark.parametrize(("method", "settings"), [("tent", {}), ("sar", {"margin_e0": 9.0}), ("rpl", {}), ("shot", {})])
def test_a_forward_without_gradient_is_an_error_at_the_first_update(cnn, images, how, method, settings):
    adapter = tta.adapt(Closed(cnn, how), method, **settings)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"would never learn: no gradient goes from its loss"):
            adapter(images)


def test_16_bit_weights_are_warned_of(cnn):
    with pytest.warns(RuntimeWarning, match=r"bfloat16, whose steps near 1 are 0\.008.*lr=0\.001 round away"):
        tta.adapt(cnn.to(torch.bfloat16), "tent")


def test_a_filter_that_lets_nothing_through_is_warned_of_once(cnn, images):
    adapter = tta.adapt(cnn, "eata", fisher_alpha=0.0, e_margin=1e-9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(60):
            adapter(images)
    assert [("no update in 50 batches" in str(warning.message)) for warning in said] == [True]
    assert adapter.progress() == (60, 0, 60, 0, 0)


@pytest.mark.parametrize(
    ("method", "settings", "size"),
    [
        ("stamp", {"alpha": 1e-9, "augment": "none"}, 4),  # no sample is sure: an empty memory
        ("deyo", {"margin": 1e-9}, 4),
        ("shot", {}, 1),  # a single image has no diversity,
        ("actmad", {}, 1),  # and no variance
    ],
)
def test_steps_left_out_without_a_loss_are_counted_and_warned_of(cnn, images, method, settings, size):
    adapter = tta.adapt(cnn, method, source=images, **settings)
    for _ in range(49):
        adapter(images[:size])
    with pytest.warns(RuntimeWarning, match="no update in 50 batches: .* the batches are too small"):
        adapter(images[:size])
    assert adapter.progress() == (50, 0, 50, 0, 0)


def test_steps_without_any_gradient_are_counted_as_such(cnn, images):
    sure = copy.deepcopy(cnn)
    sure.fc.weight.data *= 1e9  # all probabilities are 0 or 1
    adapter = tta.adapt(sure, "tent", small_batches="blend")
    for _ in range(2):
        adapter(images)
    assert (adapter.progress().updates, adapter.progress().filtered) == (0, 2)
    assert all(torch.equal(p, q) for p, q in zip(adapter.model.parameters(), sure.parameters(), strict=True))


def test_progress_counts_and_is_reset(cnn, images):
    adapter = tta.adapt(cnn, "tent", steps=2)
    adapter(images)
    with adapter.paused():
        adapter(images)
    assert adapter.progress() == (1, 2, 0, 0, 0)
    adapter.reset()
    assert adapter.progress() == (0, 0, 0, 0, 0)


def test_logits_that_are_not_finite_send_the_adapter_back(cnn, images):
    adapter = tta.adapt(cnn, "tent", optimizer="sgd", lr=1e-3, momentum=0.0)
    source = copy.deepcopy(adapter)
    for _ in range(101):
        adapter(images)
    good = adapter.state_dict()
    with torch.no_grad():
        adapter.model.fc.bias.fill_(torch.nan)
    with pytest.warns(
        RuntimeWarning, match="not finite; the adapter went back to its state of at most 100 batches before"
    ):
        logits = adapter(images)
    assert logits.isfinite().all()
    after = adapter.state_dict()
    assert all(torch.equal(good[key], after[key]) for key in good if key != "_counters")
    assert adapter.progress().recoveries == 1
    with torch.no_grad():
        adapter.model.fc.bias.fill_(torch.inf)
    assert torch.equal(adapter(images), source.predict(images))  # the second time at once: back to the source
    assert adapter.progress().recoveries == 2


@pytest.mark.parametrize("lr", [float("inf"), float("nan"), 0.0])
def test_learning_rates_are_finite_and_positive(cnn, lr):
    with pytest.raises(ValueError, match="expected a learning rate above 0, and finite"):
        tta.adapt(cnn, "tent", lr=lr)


@pytest.mark.parametrize("value", [0.4 * np.log(10), np.float32(0.9), torch.tensor(0.9)])
def test_numbers_of_numpy_and_torch_are_numbers(cnn, value):
    adapter = tta.adapt(cnn, "eata", fisher_alpha=0.0, e_margin=value, steps=np.int64(2))
    assert adapter.config.e_margin == pytest.approx(float(value))
    assert type(adapter.config.e_margin) is float
    assert adapter.config.steps == 2
