"""RDumb is ETA between two returns to the source; RPL's loss."""

import pytest
import torch

import tta

ETA = {"optimizer": "sgd", "lr": 0.1, "d_margin": 0.4}


@pytest.fixture
def batches(golden_images):
    return list(golden_images[: 7 * 16].split(16))


def test_between_returns_it_is_eta(cnn, batches):
    rdumb = tta.adapt(cnn, "rdumb", reset_every=3, **ETA)
    eta = tta.adapt(cnn, "eata", fisher_alpha=0.0, **ETA)
    for number, batch in enumerate(batches):
        if number % 3 == 0:
            eta.reset()
        assert torch.equal(rdumb(batch), eta(batch))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_return_leaves_a_fresh_adapter_but_for_its_counters(cnn, batches, optimizer):
    rdumb = tta.adapt(cnn, "rdumb", reset_every=3, **{**ETA, "optimizer": optimizer})
    for batch in batches[:3]:
        rdumb(batch)
    assert int(rdumb.batches) == 3
    fresh = tta.adapt(cnn, "rdumb", reset_every=3, **{**ETA, "optimizer": optimizer})
    for batch in batches[3:6]:
        assert torch.equal(rdumb(batch), fresh(batch))


def test_a_paused_adapter_predicts_with_the_weights_of_the_next_batch(cnn, batches):
    rdumb = tta.adapt(cnn, "rdumb", reset_every=2, **ETA)
    for batch in batches[:4]:
        with rdumb.paused():
            paused = rdumb(batch)
        assert torch.equal(paused, rdumb(batch))


def test_settings_out_of_range_are_named(cnn):
    with pytest.raises(ValueError, match="reset_every=0"):
        tta.adapt(cnn, "rdumb", reset_every=0)
    with pytest.raises(ValueError, match=r"q=1.5; expected a value in \(0, 1\]"):
        tta.adapt(cnn, "rpl", q=1.5)


def test_rpl_steps_down_the_generalised_cross_entropy(cnn, batches):
    adapter = tta.adapt(cnn, "rpl", optimizer="sgd", lr=1.0, momentum=0.0, q=0.5)
    before = [p.detach().clone() for p in adapter.parameters_to_adapt()]
    logits = adapter.predict(batches[0])
    loss = sum((1 - z.softmax(0)[z.argmax()].sqrt()) / 0.5 for z in logits) / 16
    gradients = torch.autograd.grad(loss, adapter.parameters_to_adapt())
    adapter(batches[0])
    for start, gradient, now in zip(before, gradients, adapter.parameters_to_adapt(), strict=True):
        torch.testing.assert_close(now, start - gradient, rtol=1e-4, atol=1e-6)
