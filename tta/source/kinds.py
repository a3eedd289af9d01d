"""The kinds of source statistics that a method may need, and how each is recorded.

A *kind* is one function of :data:`KINDS`, a generator that is sent the batches one by one and returns named tensors.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import taps, tasks
from tta.distributed import ALONE, Workers
from tta.functional import entropy
from tta.memory import RunningGaussian
from tta.source import shift

SourceBatch: TypeAlias = tuple[Tensor, Tensor | None]  # images (batch, 3, height, width) float; labels (batch,) or None
Known: TypeAlias = dict[str, Tensor]
Recorder: TypeAlias = Generator[None, SourceBatch | None, Known]


SPREAD = 1e-4  # of features, relative to their size: below it a float32 covariance is mostly rounding; trained networks have 0.1


@dataclass(frozen=True)
class Need:
    """One kind of source statistics that a method needs, and the settings under which it is recorded.

    Attributes:
        kind: a name in :data:`KINDS`.
        layers: names of the modules that it is recorded at.
        statistics: those that BatchNorm layers normalise by during the pass: the ``"source"``'s, which the layers store,
            or the ``"batch"``'s.
        batch_size: images per batch; None if it makes no difference to the result.
        labels: whether the source images must come with their labels.
        settings: further settings of the kind; JSON values.
    """

    kind: str
    layers: tuple[str, ...] = ()
    statistics: Literal["source", "batch"] = "source"
    batch_size: int | None = None
    labels: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, recorded: "Need") -> list[str]:
        """Descriptions of the settings in which a recorded need differs from this one."""
        found = []
        for key in (f.name for f in fields(self)):
            asked, there = getattr(self, key), getattr(recorded, key)
            if key == "layers" and asked != there:
                missing = [name for name in asked if name not in there]
                found.append(f"layers ({len(asked)} asked for, {len(there)} recorded; missing: {missing[:3]})")
            elif asked != there and not (key == "batch_size" and asked is None):
                found.append(f"{key} ({there} recorded, {asked} asked for)")
        return found


def activation_moments(model: nn.Module, need: Need) -> Recorder:
    """Mean and variance over the batch at every location of every layer, averaged over batches.

    Each batch counts the same and gives its unbiased variance, as in the code released with ActMAD; a trailing batch of
    one image has no variance and is left out. So is a layer that the forward does not reach, as those of the auxiliary
    heads of a GoogLeNet.

    Returns:
        ``<layer>.mean`` and ``<layer>.var`` in the layer's shape without its batch dimension; ``image_shape`` (3,).
    """
    rectified = need.settings.get("position") == "activation"
    total: Known = {}
    batches = 0
    while (batch := (yield)) is not None:
        images, _ = batch
        if len(images) < 2:
            continue
        with torch.no_grad(), taps.activations(model, need.layers, lambda x: layer_moments(x, rectified)) as seen:
            model(images)
        if not seen:
            raise ValueError(f"A forward pass reaches none of the {len(need.layers)} layers, as '{need.layers[0]}'.")
        now = {f"{name}.mean": mean for name, (mean, _) in seen.items()}
        now |= {f"{name}.var": var for name, (_, var) in seen.items()}
        shapes = {name: value.shape for name, value in now.items()}
        if batches and shapes != {name: value.shape for name, value in total.items()}:
            raise ValueError("Activations change their shape from batch to batch; expected images of one size.")
        total = {name: total[name] + value for name, value in now.items()} if batches else now
        batches += 1
        image_shape = torch.tensor(images.shape[1:])
    if not batches:
        raise ValueError("No source batch holds two images or more, so activations have no variance.")
    return {**{name: value / batches for name, value in total.items()}, "image_shape": image_shape}


def feature_moments(model: nn.Module, need: Need) -> Recorder:
    """Mean and unbiased standard deviation of the features, the input of the layer named, over all images.

    Settings: ``max_entropy`` keeps only images whose prediction has an entropy below it (nats), ``samples`` only the first
    of those, at most that number.

    Returns:
        ``mean`` and ``std``, (width,).
    """
    samples, max_entropy = need.settings.get("samples"), need.settings.get("max_entropy")
    kept: list[Tensor] = []
    while (batch := (yield)) is not None:
        if samples is not None and sum(map(len, kept)) >= samples:
            continue
        features, logits = _features(model, need, batch[0])
        kept.append(features if max_entropy is None else features[entropy(logits) < max_entropy])
    return _mean_and_std(torch.cat(kept)[:samples])


def token_moments(model: nn.Module, need: Need) -> Recorder:
    """Mean and unbiased standard deviation of the class token at the layers named, over all images.

    Returns:
        ``mean`` and ``std``, (layers * width,).
    """
    kept: list[Tensor] = []
    while (batch := (yield)) is not None:
        with torch.no_grad():
            kept.append(taps.class_tokens(model, need.layers, batch[0])[0])
    return _mean_and_std(torch.cat(kept))


def class_moments(model: nn.Module, need: Need) -> Recorder:
    """Mean feature of each class and its share of the images; without labels, of the classes that the model predicts.

    Returns:
        ``mean`` (classes, width), zeros for a class without images; ``prior`` (classes,), which sums to 1.
    """
    total: Tensor | None = None
    while (batch := (yield)) is not None:
        features, logits = _features(model, need, batch[0])
        classes = logits.argmax(1) if batch[1] is None else batch[1]
        member = F.one_hot(classes, logits.shape[1]).float()
        now = member.T @ torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
        total = now if total is None else total + now
    assert total is not None
    count = total[:, -1:]
    return {"mean": total[:, :-1] / count.clamp(min=1), "prior": count[:, 0] / count.sum()}


def class_gaussians(model: nn.Module, need: Need) -> Recorder:
    """Mean and covariance of the features, of each class and of all images, divided by the number of images.

    Classes are those that the model predicts, as in the code released with TTAC, unless labels are asked for. Setting
    ``covariance`` is that of the classes: ``"full"``, ``"diagonal"`` (only variances) or ``"none"``.

    Returns:
        ``class_mean`` (classes, width), zeros for a class without images; ``class_covariance`` (classes, width, width) or
        (classes, width); ``class_count`` (classes,); ``mean`` (width,); ``covariance`` (width, width).
    """
    full = need.settings.get("covariance") == "full"
    classes: RunningGaussian | None = None
    while (batch := (yield)) is not None:
        features, logits = _features(model, need, batch[0])
        if classes is None:
            means = features.new_zeros(logits.shape[1], features.shape[1])
            classes = RunningGaussian(means, means[..., None] * means[:, None] if full else means)
            total = RunningGaussian(means[:1], means[:1, :, None] * means[:1, None])
        labels = logits.argmax(1) if batch[1] is None else batch[1]
        classes.add(features, F.one_hot(labels, logits.shape[1]).bool())
        total.add(features, torch.ones_like(features[:, :1], dtype=torch.bool))
    assert classes is not None
    _require_spread(total)
    known = {"class_mean": classes.mean, "class_covariance": classes.covariance, "class_count": classes.count}
    if need.settings.get("covariance") == "none":
        del known["class_covariance"]
    return {**known, "mean": total.mean[0], "covariance": total.covariance[0]}


def feature_subspace(model: nn.Module, need: Need) -> Recorder:
    """Principal directions of the features, the input of the layer named, and the unbiased variance along each.

    Setting ``components`` is their largest number. Directions whose variance is rounding are left out.

    Adachi et al., "Test-time Adaptation for Regression by Subspace Alignment", ICLR 2025.

    Returns:
        ``mean`` (width,); ``basis`` (width, directions), orthonormal columns; ``variance`` (directions,), the largest first.
    """
    total: RunningGaussian | None = None
    while (batch := (yield)) is not None:
        with torch.no_grad(), taps.inputs(model, need.layers[0]) as seen:
            model(batch[0])
        if not seen:
            raise ValueError(f"A forward pass never reaches layer '{need.layers[0]}', whose input the features are.")
        features = seen[-1].double()  # a covariance in float32 loses the small directions
        if total is None:
            mean = torch.zeros_like(features[:1])
            total = RunningGaussian(mean, mean[..., None] * mean[:, None])
        total.add(features, torch.ones_like(features[:, :1], dtype=torch.bool))
    assert total is not None
    _require_spread(total)
    images = float(total.count)
    variance, basis = torch.linalg.eigh(total.covariance[0] * (images / (images - 1)))
    kept = (variance > SPREAD**2 * variance[-1]).nonzero()[:, 0].flip(0)[: need.settings["components"]]
    return {"mean": total.mean[0].float(), "basis": basis[:, kept].float(), "variance": variance[kept].float()}


def fisher(model: nn.Module, need: Need) -> Recorder:
    """Diagonal Fisher information of the parameters of the layers named, from the model's own predictions.

    The square of a batch's *mean* gradient, averaged over batches: it shrinks as the batch grows, so the weight of a
    penalty depends on the batch size. A batch of one is left out if layers normalise by the batch.

    Of maps it is of the mean over all pixels of a batch.

    Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022.

    Returns:
        One tensor per parameter, under its name in the model.
    """
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in need.layers]
    if not names:
        raise ValueError(
            f"The layers of {type(model).__name__} that would adapt have no scale and shift (affine=False)."
        )
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    total = [torch.zeros_like(p) for p in parameters]
    batches = 0
    while (batch := (yield)) is not None:
        images, _ = batch
        if len(images) < 2 and need.statistics == "batch":
            continue
        logits = tasks.read(model(images), images)
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), parameters, allow_unused=True)
        total = [t if g is None else t + g.square() for t, g in zip(total, gradients, strict=True)]
        batches += 1
    if not batches:
        raise ValueError("No source batch holds two images or more, so there are no batch statistics to normalise by.")
    return {name: value / batches for name, value in zip(names, total, strict=True)}


def replay(model: nn.Module, need: Need) -> Recorder:
    """The source images themselves, for replay; a file of such statistics holds source data.

    Setting ``samples`` is the size of the random sample that is kept (Vitter, "Random Sampling with a Reservoir", ACM TOMS
    1985); if there are fewer images, all are kept.

    Returns:
        ``images`` (images, 3, height, width), uint8, rounded to whole steps of 1/255; ``labels`` (images,), int64, -1 if
        the need asks for none.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Tensor]] = []
    seen = 0
    while (batch := (yield)) is not None:
        labels = torch.full((len(batch[0]),), -1) if batch[1] is None else batch[1].cpu()
        for image, label in zip((batch[0].detach() * 255).round().byte().cpu(), labels, strict=True):
            place = seen if seen < need.settings["samples"] else int(torch.randint(seen + 1, (), generator=generator))
            if place < need.settings["samples"]:
                kept[place : place + 1] = [(image.clone(), label.clone())]
            seen += 1
    if len({image.shape for image, _ in kept}) > 1:
        raise ValueError("The source images to be kept differ in size; expected images of one size.")
    return {"images": torch.stack([i for i, _ in kept]), "labels": torch.stack([label.long() for _, label in kept])}


def labelled_features(model: nn.Module, need: Need) -> Recorder:
    """Features, the input of the layer named, with the labels of their images; a file of them holds what the model saw.

    Setting ``samples`` is the size of the random sample that is kept; if there are fewer images, all are kept.

    Returns:
        ``features`` (images, width), float32, and ``labels`` (images,), int64, in the order of the images.
    """
    generator = torch.Generator().manual_seed(0)
    head: Any = model.get_submodule(need.layers[0])
    kept: tuple[Tensor, ...] | None = None  # features, labels, and a random number for each image
    while (batch := (yield)) is not None:
        assert batch[1] is not None
        features, _ = _features(model, need, batch[0])
        _require_known(batch[1], int(head.out_features))
        draws = torch.rand(len(features), generator=generator, dtype=torch.float64).to(features.device)
        now = (features, batch[1].long(), draws)
        kept = now if kept is None else tuple(torch.cat(parts) for parts in zip(kept, now, strict=True))
        if len(kept[2]) > need.settings["samples"]:  # those of the smallest numbers
            chosen = kept[2].topk(need.settings["samples"], largest=False).indices.sort().values
            kept = tuple(part[chosen] for part in kept)
    assert kept is not None
    return {"features": kept[0], "labels": kept[1]}


def shift_network(model: nn.Module, need: Need) -> Recorder:
    """The weights of a :class:`tta.source.shift.ShiftNetwork`, trained on the features and labels of all source images.

    Returns:
        Its state, and ``prior`` (classes,), the share of images that a class has.
    """
    known: list[tuple[Tensor, Tensor]] = []
    classes = 0
    while (batch := (yield)) is not None:
        assert batch[1] is not None
        features, logits = _features(model, need, batch[0])
        known.append((features, batch[1]))
        classes = logits.shape[1]
    features, labels = (torch.cat(parts) for parts in zip(*known, strict=True))
    _require_known(labels, classes)
    prior = torch.bincount(labels, minlength=classes) / len(labels)
    network = shift.train(features, labels, prior, model.get_submodule(need.layers[0]), **need.settings)
    return {**network.state_dict(), "prior": prior}


KINDS: Mapping[str, Callable[[nn.Module, Need], Recorder]] = {
    kind.__name__: kind
    for kind in (
        activation_moments,
        feature_moments,
        token_moments,
        class_moments,
        class_gaussians,
        feature_subspace,
        fisher,
        replay,
        labelled_features,
        shift_network,
    )
}


def layer_moments(x: Tensor, rectified: bool, workers: Workers = ALONE) -> tuple[Tensor, Tensor]:
    """:func:`~tta.functional.batch_moments` of a layer's output, or of its output after a ReLU, over all workers."""
    return workers.batch_moments(x.relu() if rectified else x)


def _features(model: nn.Module, need: Need, images: Tensor) -> tuple[Tensor, Tensor]:
    (layer,) = need.layers
    with torch.no_grad():
        return taps.look(model, layer, images)


def _require_known(labels: Tensor, classes: int) -> None:
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"A source label lies outside 0 to {classes - 1}, the classes of the model.")


def _require_spread(features: RunningGaussian) -> None:
    """Raise a ValueError if features are the same for all images, to rounding: the inverse of their covariance is noise."""
    size = float(features.mean.square().mean().sqrt())
    deviation = float(features.covariance.diagonal(dim1=-2, dim2=-1).mean().clamp(min=0).sqrt())
    if deviation <= SPREAD * size:
        raise ValueError(
            f"The features of the source images hardly differ from image to image: by {deviation:.1g}, of a size of "
            f"{size:.1g}. A Gaussian cannot be fitted to them. Pass source images that differ, and a model that is trained."
        )


def _mean_and_std(features: Tensor) -> Known:
    if len(features) < 2:
        raise ValueError(f"{len(features)} source images are left to take mean and std of; expected 2 or more.")
    std, mean = torch.std_mean(features, dim=0)
    return {"mean": mean, "std": std}
