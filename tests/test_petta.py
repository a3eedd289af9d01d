"""PeTTA: student, teacher, anchor, divergence and statistics recomputed plainly; batches, models, classes without a source."""

import pytest
import torch

import tta

CLASSES = 4
SHARED = {"alpha_0": 0.6, "lambda_0": 3.0, "anchor_weight": 0.7, "nu": 0.4, "bn_momentum": 0.2}
SGD = {"optimizer": "sgd", "lr": 0.3, "momentum": 0.0}


@pytest.fixture
def model(small_cnn, source):
    """It predicts all classes: its logits are centred over the source images."""
    torch.manual_seed(0)
    model = small_cnn(6, CLASSES).eval()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.norm.running_var.uniform_(0.02, 0.1)
    model.norm.bias.data.uniform_(-0.5, 0.5)
    model.fc.weight.data *= 10
    with torch.no_grad():
        model.fc.bias -= model(source).mean(0)
        assert model(source).argmax(1).bincount(minlength=CLASSES).min() > 2
    return model


def some_images(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, 8, 8, generator=generator) * torch.rand(number, 3, 1, 1, generator=generator)


@pytest.fixture
def images():
    return some_images(40, seed=1)


@pytest.fixture
def source():
    return some_images(64, seed=2)


class Net:
    """The network with its BatchNorm layer written out: scale, shift and two statistics."""

    def __init__(self, model):
        self.model, layer = model, model.norm
        self.affine = [layer.weight.detach().clone(), layer.bias.detach().clone()]
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()

    def __call__(self, x, learn=0.0):
        """Features and logits; the statistics take in a share ``learn`` of the batch's."""
        x = self.model.conv(x)
        center = x.mean((0, 2, 3))
        spread = ((x - center.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
        mean, var = (1 - learn) * self.mean + learn * center, (1 - learn) * self.var + learn * spread
        self.mean, self.var = mean.detach(), var.detach()
        scale, shift, mean, var = (v.view(1, -1, 1, 1) for v in (*self.affine, mean, var))
        features = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu().mean((2, 3))
        return features, self.model.fc(features)


def cross(target, logits):
    return -(target.softmax(1) * logits.log_softmax(1)).sum(1)


def plain_petta(model, images, source, memory, *, every, loss_func, regularizer, view, lr):
    """The released algorithm, image by image. Yields the logits of each image, and what it has learned so far."""
    student, teacher, anchor = Net(model), Net(model), Net(model)
    features, logits = (value.detach() for value in student(source))
    of_class = [features[logits.argmax(1) == k] for k in range(CLASSES)]
    mean = [f.mean(0) for f in of_class]
    var = [f.var(0) for f in of_class]
    average, recent = list(mean), []
    start = [p.clone() for p in student.affine]
    for number, image in enumerate(images, start=1):
        features, logits = (value.detach() for value in teacher(image[None]))
        p = logits[0].softmax(0)
        label = int(p.argmax())
        memory.add(image, label, float(-(p * (p + 1e-6).log()).sum()))
        recent.append((label, features[0]))
        yield logits, student, teacher, average
        if number % every:
            continue
        met = sorted({label for label, _ in recent})
        drift = torch.cat([(average[k] - mean[k]) ** 2 / (var[k] + 1e-6) for k in met]).mean()
        divergence = float(1 - torch.exp(-drift))
        for k in met:
            new = torch.stack([f for label, f in recent if label == k]).mean(0)
            average[k] = (1 - SHARED["nu"]) * average[k] + SHARED["nu"] * new
        recent = []
        samples = torch.stack(memory.contents()[0])
        share = SHARED["bn_momentum"]
        target, held = teacher(samples, share)[1].detach(), anchor(samples, share)[1].detach()
        student.affine = [p.requires_grad_() for p in student.affine]
        plain, viewed = student(samples, share)[1], student(view(samples), share)[1]
        both = [cross(target, plain), cross(plain, target), cross(target, viewed), cross(viewed, target)]
        loss = sum(both).mean() / 4 if loss_func == "sce" else both[2].mean()
        if regularizer == "l2":
            distance = sum(((p - q) ** 2).sum() for p, q in zip(student.affine, start, strict=True)) / 2
        else:
            distance = -sum(p @ q / p.norm() / q.norm() for p, q in zip(student.affine, start, strict=True)) / 2
        loss = loss + SHARED["anchor_weight"] * cross(held, viewed).mean()
        loss = loss + divergence * SHARED["lambda_0"] * distance
        gradients = torch.autograd.grad(loss, student.affine)
        student.affine = [(p - lr * g).detach() for p, g in zip(student.affine, gradients, strict=True)]
        follow = (1 - divergence) * SHARED["alpha_0"]
        teacher.affine = [(1 - follow) * t + follow * s for t, s in zip(teacher.affine, student.affine, strict=True)]


@pytest.mark.parametrize("loss_func", ["sce", "ce"])
@pytest.mark.parametrize("regularizer", ["cosine", "l2"])
@pytest.mark.parametrize(("every", "batch"), [(5, 1), (10, 10), (20, 5)])
def test_recomputed_plainly(plain_memory, model, images, source, every, batch, loss_func, regularizer):
    """A wrong sign, a statistic that is not moved, a class average of all features: all would be seen."""
    view = lambda x: x.flip(3) * 0.8  # noqa: E731
    kinds = {"loss_func": loss_func, "regularizer": regularizer}
    adapter = tta.adapt(
        model, "petta", source=source, memory_size=8, update_frequency=every, augment=view, **SHARED, **SGD, **kinds
    )
    memory = plain_memory(8, CLASSES, 1.0, 1.0)
    steps = plain_petta(model, images, source, memory, every=every, view=view, lr=SGD["lr"], **kinds)
    for x in images.split(batch):
        logits = adapter(x)
        seen = [next(steps) for _ in x]
        torch.testing.assert_close(logits, torch.cat([row for row, *_ in seen]), atol=1e-4, rtol=1e-4)
    next(steps, None)  # the last update
    _, student, teacher, average = seen[-1]
    for ours, theirs in ((adapter.model, student), (adapter.teacher, teacher)):
        layer = ours.norm.layer
        torch.testing.assert_close([layer.weight, layer.bias], theirs.affine, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            [layer.running_mean, layer.running_var], [theirs.mean, theirs.var], atol=1e-4, rtol=1e-4
        )
        assert (layer.weight - model.norm.weight).abs().max() > 0.01
    torch.testing.assert_close(adapter.means, torch.stack(average), atol=1e-4, rtol=1e-4)


def test_divergence_is_none_at_the_source_and_grows(model, images, source):
    adapter = tta.adapt(model, "petta", source=source, update_frequency=10, nu=0.5, augment="none")
    seen, learn = [], adapter._learn
    adapter._learn = lambda divergence: (seen.append(float(divergence)), learn(divergence))
    for x in (images * 0.1).split(10):
        adapter(x)
    assert seen[0] == 0
    assert 0 < seen[1] < seen[3] < 1


def test_classes_that_the_source_lacks_do_not_count(model, images, source):
    """Their variance is unknown; the released code divides by zero."""
    labels = model(source).argmax(1)
    common = int(labels.bincount().argmax())
    adapter = tta.adapt(model, "petta", source=source[labels == common], update_frequency=10, nu=1.0, augment="none")
    assert adapter.source_known[:, 0].tolist() == [k == common for k in range(CLASSES)]
    assert len(adapter(images).argmax(1).unique()) > 1
    assert adapter.means.isfinite().all()
    assert not adapter.means[torch.arange(CLASSES) != common].any()
    assert adapter(images).isfinite().all()


def test_vit_is_served(vit, golden_images, golden_source):
    """LayerNorm layers adapt; there are no statistics to follow."""
    adapter = tta.adapt(vit, "petta", source=golden_source, update_frequency=32, alpha_0=0.5, augment="none")
    assert torch.equal(adapter(golden_images[:64]), vit(golden_images[:64]).detach())
    assert not torch.equal(adapter.predict(golden_images[:8]), vit(golden_images[:8]))
    assert not torch.equal(adapter.teacher.norm.weight, vit.norm.weight)


def test_source_is_needed(model):
    with pytest.raises(ValueError, match="needs to know the source domain"):
        tta.adapt(model, "petta")


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"alpha_0": 1.5}, "alpha_0=1.5"),
        ({"nu": -0.1}, "nu=-0.1"),
        ({"lambda_0": -1.0}, "lambda_0=-1.0"),
        ({"anchor_weight": -1.0}, "anchor_weight=-1.0"),
        ({"bn_momentum": 2.0}, "bn_momentum=2.0"),
        ({"source_batch_size": 0}, "source_batch_size=0"),
        ({"memory_size": 0}, "memory_size=0"),
    ],
)
def test_wrong_values_are_named(model, source, hparams, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(model, "petta", source=source, **hparams)
