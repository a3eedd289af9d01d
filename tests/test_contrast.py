"""RMT and SANTA where the golden stream does not look: the contrast pair by pair, prototypes, projectors, views."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import tta
from tta.adapter import optimizers
from tta.methods._contrast import contrastive, new_projector
from tta.methods.rmt import RMT


@pytest.fixture
def batches(golden_images):
    return list(golden_images[:64].split(16))


def flipped(x):
    return x.flip(3)


@pytest.mark.parametrize(("views", "things"), [(3, 5), (2, 4), (3, 1)])
def test_contrast_is_the_plain_recomputation(views, things):
    vectors = torch.randn(views, things, 6, generator=torch.Generator().manual_seed(0))
    unit = {(v, i): (vectors[v, i] / vectors[v, i].norm()).tolist() for v in range(views) for i in range(things)}
    losses = []
    for (v, i), anchor in unit.items():
        likeness = {k: math.exp(sum(a * b for a, b in zip(anchor, u, strict=True)) / 0.2) for k, u in unit.items()}
        others = sum(value for key, value in likeness.items() if key != (v, i))
        losses += [-math.log(likeness[w, i] / others) for w in range(views) if w != v]
    assert float(contrastive(vectors, 0.2)) == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-6)


def plain_step(method, cnn, source, batches, settings):
    """An adapter, and the gradients by parameter of its first loss, written as the papers do."""
    adapter = tta.adapt(cnn, method, source=source, **settings)

    def features(x):
        kept = []
        handle = adapter.model.fc.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        logits = adapter.model(x)
        handle.remove()
        return kept[0], logits

    f, z = features(batches[0])
    fa, za = features(flipped(batches[0]))
    target = z.detach()  # teacher and anchor are the source, as the student is at first

    def cross_entropy(p, q):
        return -(p.softmax(1) * q.log_softmax(1)).sum(1).mean()

    if method == "rmt":
        training = sum(0.25 * (cross_entropy(target, y) + cross_entropy(y, target)) for y in (z, za))
    else:
        training = sum(0.5 * cross_entropy(y, target) for y in (z, za))
    prototypes = adapter.contrast.prototypes
    nearest = torch.stack(
        [max(prototypes, key=lambda p, g=g: float(F.cosine_similarity(p, g, dim=0))) for g in f.detach()]
    )
    vectors = torch.stack([F.normalize(adapter.contrast.projector(part)) for part in (nearest, f, fa)])
    loss = 0.5 * training + 2.0 * contrastive(vectors, 0.3)
    return adapter, dict(
        zip(adapter.parameters_to_adapt(), torch.autograd.grad(loss, adapter.parameters_to_adapt()), strict=True)
    )


@pytest.mark.parametrize("method", ["rmt", "santa"])
def test_a_step_is_the_plain_recomputation(cnn, golden_source, batches, method):
    settings = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "augment": flipped}
    settings |= {"lambda_ce_trg": 0.5, "lambda_cont": 2.0, "temperature": 0.3, "projection_dim": 8}
    adapter, gradients = plain_step(method, cnn, golden_source[:64], batches, settings)
    before = {p: p.detach().clone() for p in gradients}
    adapter(batches[0])
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(parameter, before[parameter] - 0.1 * gradient, rtol=1e-3, atol=1e-5)


def test_rmt_teacher_follows_and_both_are_summed(cnn, golden_source, batches):
    adapter = tta.adapt(cnn, "rmt", source=golden_source[:64], mt_alpha=0.75, augment="none")
    before = copy.deepcopy(adapter.model)
    logits = adapter(batches[0])
    torch.testing.assert_close(logits, 2 * before(batches[0]), rtol=1e-4, atol=1e-4)
    pairs = zip(before.parameters(), adapter.model.parameters(), adapter.teacher.parameters(), strict=True)
    for start, student, teacher in pairs:
        torch.testing.assert_close(teacher, 0.75 * start + 0.25 * student)
    expected = adapter.model(batches[1]) + adapter.teacher(batches[1])
    with adapter.paused():
        assert torch.equal(adapter(batches[1]), expected.detach())


def test_labels_are_used_where_asked_for_and_else_predicted(cnn, golden_source):
    labels = torch.zeros(64, dtype=torch.long)
    labels[:32] = 7
    batches = [(golden_source[:64], labels)]
    given = tta.adapt(cnn, "santa", source=batches, source_labels=True).contrast
    predicted = tta.adapt(cnn, "santa", source=batches).contrast
    assert given.absent.nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert torch.equal(predicted.prototypes, tta.adapt(cnn, "santa", source=golden_source[:64]).contrast.prototypes)
    assert not torch.allclose(given.prototypes[7], predicted.prototypes[7], atol=0.1)
    with pytest.raises(ValueError, match="needs labelled source images"):
        tta.adapt(cnn, "santa", source=golden_source[:64], source_labels=True)


def test_an_absent_class_is_nobodys_nearest(cnn, golden_source):
    labels = torch.zeros(64, dtype=torch.long)
    contrast = tta.adapt(cnn, "santa", source=[(golden_source[:64], labels)], source_labels=True).contrast
    features = -contrast.prototypes[:1]  # less like the one prototype there is than like the zeros of the others
    contrast.projector = nn.Identity()
    expected = contrastive(torch.stack([contrast.prototypes[:1], features, features]), 0.1)
    assert torch.equal(contrast(features, features), expected)


def test_a_given_projector_is_copied_and_adapts(cnn, golden_source, batches):
    projector = nn.Linear(64, 4)
    before = copy.deepcopy(projector.state_dict())
    adapter = tta.adapt(cnn, "santa", source=golden_source[:64], projector=projector, augment="none")
    adapter(batches[0])
    assert not torch.equal(adapter.contrast.projector.weight, before["weight"])
    assert torch.equal(projector.weight, before["weight"])


def test_a_new_projector_is_drawn_from_the_generator_alone():
    state = torch.get_rng_state()
    one, other = (new_projector(64, 8, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[2].weight, other[2].weight)
    assert one[0].weight.abs().max() <= 64**-0.5
    assert float(one[0].weight.detach().std()) == pytest.approx(64**-0.5 / 3**0.5, rel=0.1)
    assert one[2].bias.abs().max() <= 8**-0.5


@pytest.mark.parametrize("method", ["rmt", "santa"])
def test_without_contrast_no_source_is_needed(cnn, batches, method):
    assert tta.adapt(cnn, method, lambda_cont=0.0)(batches[0]).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"lambda_cont": -1.0}, "lambda_cont=-1.0"),
        ({"projector": 3}, "projector=3; expected a torch.nn.Module"),
        ({"mt_alpha": 2.0}, "mt_alpha=2.0"),
    ],
)
def test_settings_out_of_range_are_named(cnn, golden_source, settings, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(cnn, "rmt", source=golden_source[:64], **settings)


def test_replay_adds_the_classification_of_source_images(cnn, golden_source, batches):
    """With as many source images kept as a batch holds, each batch replays all of them."""
    images = (golden_source[:16] * 255).round() / 255
    labels = torch.arange(16) % 10
    sgd = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "augment": "none", "lambda_cont": 0.0, "lambda_ce_trg": 0.0}
    source = TensorDataset(images, labels)
    adapter = tta.adapt(cnn, "rmt", source=source, lambda_ce_src=0.5, source_batch_size=16, **sgd)
    parameters = adapter.parameters_to_adapt()
    before = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(0.5 * F.cross_entropy(adapter.model(images), labels), parameters)
    assert not any(value.shape[-3:] == images.shape[1:] for value in adapter.state_dict().values())
    adapter(batches[0])
    for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * gradient, rtol=1e-3, atol=1e-5)


def test_replay_and_warm_up_go_on_from_a_saved_state_and_again_after_a_reset(cnn, golden_source, batches):
    source = TensorDataset(golden_source[:64], torch.arange(64) % 10)
    settings = {"lambda_ce_src": 1.0, "num_samples_warm_up": 64, "source_batch_size": 16, "source_samples": 40}

    def fresh():
        return tta.adapt(cnn, "rmt", source=source, **settings)

    adapter, other = fresh(), fresh()
    first = [adapter(x) for x in batches]
    other(batches[0])
    loaded = fresh()
    loaded.load_state_dict(other.state_dict())
    assert all(torch.equal(loaded(x), y) for x, y in zip(batches[1:], first[1:], strict=True))
    adapter.reset()
    assert all(torch.equal(adapter(x), y) for x, y in zip(batches, first, strict=True))


def test_warm_up_is_agreement_on_source_images_at_a_rising_rate(cnn, golden_source):
    """Two batches of the same 16 images, at half the learning rate and at all of it."""
    images = (golden_source[:16] * 255).round() / 255
    sgd = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "lambda_cont": 0.0}
    plain = tta.adapt(cnn, "rmt", **sgd)
    student, teacher = plain.model, plain.teacher
    adapter = tta.adapt(cnn, "rmt", source=images, num_samples_warm_up=32, source_batch_size=16, mt_alpha=0.9, **sgd)
    parameters = plain.parameters_to_adapt()
    for lr in (0.05, 0.1):
        p, q = student(images), teacher(images).detach()
        loss = -(q.softmax(1) * p.log_softmax(1) + p.softmax(1) * q.log_softmax(1)).sum(1).mean() / 2
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= lr * gradient
        for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            average.data = 0.9 * average + 0.1 * parameter.data
    for mine, theirs in ((adapter.model, student), (adapter.teacher, teacher)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(adapter.model.parameters(), cnn.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_stream_begins_with_the_moments_of_the_warm_up(cnn, golden_source, batches, optimizer, monkeypatch):
    """The released code has one optimizer for both: warm-up and stream are one run of it."""
    settings = {"optimizer": optimizer, "lr": 0.01, "lambda_cont": 0.0, "source_batch_size": 16, "augment": "none"}
    images = (golden_source[:16] * 255).round() / 255
    made, restart = [], RMT.restart_optimizer
    monkeypatch.setattr(RMT, "restart_optimizer", lambda self: (restart(self), made.append(self.optimizer))[0])
    adapter = tta.adapt(cnn, "rmt", source=images, num_samples_warm_up=48, **settings)
    of_warm_up, of_stream = (optimizers.moments(one) for one in made)
    assert len(of_stream) == len([moments for moments in of_stream if moments]) == len(adapter.parameters_to_adapt())
    for mine, theirs in zip(of_stream, of_warm_up, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) and mine[key] is not theirs[key] for key in mine)
    assert adapter.optimizer.param_groups[0]["lr"] == 0.01
    before = adapter.state_dict()
    duplicate = copy.deepcopy(adapter)
    for x in batches:
        adapter(x)
    adapter.reset()
    duplicate.reset()
    assert all(torch.equal(adapter.state_dict()[key], value) for key, value in before.items())
    assert all(torch.equal(duplicate.state_dict()[key], value) for key, value in before.items())


def test_replay_needs_labels(cnn, golden_source):
    with pytest.raises(ValueError, match="replay needs labelled source images"):
        tta.adapt(cnn, "rmt", source=golden_source[:64], lambda_ce_src=1.0)
