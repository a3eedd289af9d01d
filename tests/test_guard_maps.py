"""The guard around methods whose model gives maps: a picture is one sample, its classes weigh alike."""

import logging

import pytest
import torch

import tta
from tta.guard import Monitor, harm
from tta.guard.monitor import some_pixels

WRONG = {"lr": 1.0}  # a thousand times too high


@pytest.fixture(autouse=True)
def silent(caplog):
    caplog.set_level(logging.CRITICAL, logger="tta.guard")


@pytest.fixture(scope="module")
def model():
    return tta.load_model("digits-maps")


def stream(*corruptions, samples=64, batch_size=16):
    return tta.stream("digits-mosaic", corruptions=list(corruptions), samples=samples, batch_size=batch_size)


def run(model, method, target, **options):
    adapter = tta.adapt(model, method, task="segmentation", **options)
    return tta.evaluate(adapter, target, progress=False, frames=[]), adapter


def maps(seed, size=(3, 5, 6, 7)):
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_harm_of_a_map_is_a_mean_over_the_classes_that_the_source_sees():
    adapted, source = maps(0), maps(1)
    found = harm(adapted, source)
    for picture in range(3):
        pixels = [logits[picture].flatten(1).T for logits in (adapted, source)]
        each = harm(*pixels)
        classes = pixels[1].argmax(1)
        parts = [each[classes == number] for number in classes.unique()]
        weights = [len(part) ** 0.25 for part in parts]
        expected = sum(w * part.mean() for w, part in zip(weights, parts, strict=True)) / sum(weights)
        assert found[picture] == pytest.approx(float(expected))


def test_a_map_of_background_does_harm_although_most_pixels_agree():
    source = torch.full((4, 3, 8, 8), -5.0)
    source[:, 0] = 5
    source[:, :2, :2, :4] = torch.tensor([-5.0, 5]).view(2, 1, 1)  # an eighth of the picture
    background = torch.full((4, 3, 8, 8), -5.0)
    background[:, 0] = 5
    assert (harm(background, source) > 0.3).all()
    assert harm(source, source).abs().max() < 0.01


def test_pictures_are_counted_and_their_classes_are_shares():
    monitor = Monitor(5, 0.05, 0.02)
    adapted, source = maps(0), maps(1)
    monitor.update(adapted, source)
    assert monitor.test.count == monitor.seen == 3
    torch.testing.assert_close(monitor.predicted.sum(1), torch.full((2,), 3.0, dtype=torch.float64))
    expected = torch.bincount(source.argmax(1).flatten(), minlength=5) / 42
    torch.testing.assert_close(monitor.predicted[1], expected.double())


def test_of_maps_some_pixels_are_looked_at_and_of_rows_all():
    assert some_pixels(torch.rand(2, 5, 64, 96)).shape == (2, 5, 16, 24)
    rows = torch.rand(4, 5)
    assert some_pixels(rows) is rows


def test_a_rate_far_too_high_does_no_lasting_harm(model):
    target = stream("gaussian_noise", "jpeg_compression", samples=96)
    source = run(model, "source", target)[0].score.value
    assert run(model, "tent", stream("gaussian_noise", samples=80), **WRONG)[0].score.value < source - 40
    result, adapter = run(model, "tent", target, guard=True, **WRONG)
    assert result.score.value > source - 10
    assert adapter.guard.counts["alarms"] == 1
    assert result.metrics["guard"]["batches_source"] > 4


def test_gains_where_the_source_fails_are_kept(model):
    """In frost and fog the source is wrong and sure of it; nearly all its pixels are overruled."""
    target = stream("frost", "fog", samples=32)
    plain, _ = run(model, "norm", target)
    guarded, adapter = run(model, "norm", target, guard=True)
    assert guarded.scores == plain.scores
    assert adapter.guard.counts["alarms"] == 0
    assert adapter.guard.counts["checks"] > 2


def test_a_state_goes_on_with_its_guard(model):
    batches = [batch.images for batch in stream("gaussian_noise")]
    adapter = tta.adapt(model, "tent", task="segmentation", guard={"hold": 1}, **WRONG)
    for batch in batches[:2]:
        adapter(batch)
    state = adapter.state_dict()
    expected = [adapter(batch) for batch in batches[2:]]
    assert adapter.guard.counts["alarms"] > 0
    again = tta.adapt(model, "tent", task="segmentation", guard={"hold": 1}, **WRONG)
    again.load_state_dict(state)
    assert all(torch.equal(again(batch), logits) for batch, logits in zip(batches[2:], expected, strict=True))
    adapter.reset()
    first = tta.adapt(model, "tent", task="segmentation", guard={"hold": 1}, **WRONG)
    assert torch.equal(adapter(batches[0]), first(batches[0]))
    assert adapter.guard.counts == first.guard.counts


def test_nobody_is_asked_about_a_map(model):
    adapter = tta.adapt(model, "norm", task="segmentation", guard=True)
    batch = stream("fog", samples=4, batch_size=4)[0].images / 255
    assert adapter.queries(2) == []
    adapter(batch)
    assert adapter.queries(2) == []


@pytest.mark.parametrize("task", ["detection", "regression"])
def test_tasks_without_classes_are_refused(task):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3, 1))
    with pytest.raises(ValueError, match=f"probabilities of classes .* it does not serve {task}"):
        tta.adapt(model, "norm", task=task, guard=True)
