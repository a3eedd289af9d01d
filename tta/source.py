"""What a method may know of the source domain: recorded in one pass over source images, saved, checked on use.

A method declares a :class:`Need` for each thing it must know. A *kind* of knowledge is one function of :data:`KINDS`, a
generator that is sent the batches one by one and returns named tensors; all kinds share the pass, so images are decoded
once.
"""

import copy
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tta import fingerprint, norms, shift, taps
from tta.functional import batch_moments, entropy, logits_of
from tta.memory import RunningGaussian

BATCH_SIZE = 64
EXPECTED = (
    "a tensor of source images (images, 3, height, width), an iterable of such batches (pairs with labels will do), a "
    "dataset of (image, label), a tta.SourceStatistics, or the path of a saved one"
)


@dataclass(frozen=True)
class Need:
    """One thing that a method must know of the source domain, and the settings under which it is recorded.

    Attributes:
        kind: a name in :data:`KINDS`.
        layers: names of the modules that it is recorded at.
        statistics: what BatchNorm layers normalise by during the pass, their own statistics or the ``"batch"``'s.
        batch_size: images a batch; None where it makes no difference to the result.
        labels: whether the source images must come with their labels.
        settings: what else the kind asks for; JSON values.
    """

    kind: str
    layers: tuple[str, ...] = ()
    statistics: Literal["source", "batch"] = "source"
    batch_size: int | None = None
    labels: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, recorded: "Need") -> list[str]:
        """In words, the settings of a recorded need that are not those asked for here."""
        found = []
        for key in (f.name for f in fields(self)):
            asked, there = getattr(self, key), getattr(recorded, key)
            if key == "layers" and asked != there:
                missing = [name for name in asked if name not in there]
                found.append(f"layers ({len(asked)} asked for, {len(there)} recorded; missing: {missing[:3]})")
            elif asked != there and not (key == "batch_size" and asked is None):
                found.append(f"{key} ({there} recorded, {asked} asked for)")
        return found


# ---------------------------------------------------------------------- kinds

Batch: TypeAlias = tuple[Tensor, Tensor | None]  # images (batch, 3, height, width) float; labels (batch,) or None
Known: TypeAlias = dict[str, Tensor]
Recorder: TypeAlias = Generator[None, Batch | None, Known]


def activation_moments(model: nn.Module, need: Need) -> Recorder:
    """Mean and variance over the batch at every location of every layer, averaged over batches.

    Each batch counts the same and gives its unbiased variance, as in the code released with ActMAD; a trailing batch of
    one image has no variance and is left out.

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
        if unreached := [name for name in need.layers if name not in seen]:
            raise ValueError(f"A forward pass never reaches layer '{unreached[0]}': leave it out of the layers.")
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

    Settings: ``max_entropy`` keeps only images whose prediction has an entropy below so many nats, ``samples`` only the
    first so many of those.

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
    features = torch.cat(kept)[:samples]
    if len(features) < 2:
        raise ValueError(f"{len(features)} source images are left to take mean and std of; expected 2 or more.")
    std, mean = torch.std_mean(features, dim=0)
    return {"mean": mean, "std": std}


def token_moments(model: nn.Module, need: Need) -> Recorder:
    """Mean and unbiased standard deviation of the class token at the layers named, over all images.

    Returns:
        ``mean`` and ``std``, (layers * width,).
    """
    kept: list[Tensor] = []
    while (batch := (yield)) is not None:
        with torch.no_grad():
            kept.append(taps.class_tokens(model, need.layers, batch[0])[0])
    features = torch.cat(kept)
    if len(features) < 2:
        raise ValueError(f"There are {len(features)} source images to take mean and std of; expected 2 or more.")
    std, mean = torch.std_mean(features, dim=0)
    return {"mean": mean, "std": std}


def class_moments(model: nn.Module, need: Need) -> Recorder:
    """Mean feature of each class and the share of images it has; by the model's own predictions without labels.

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
    ``covariance`` is that of the classes: ``"full"``, ``"diagonal"`` (variances alone) or ``"none"``.

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
    known = {"class_mean": classes.mean, "class_covariance": classes.covariance, "class_count": classes.count}
    if need.settings.get("covariance") == "none":
        del known["class_covariance"]
    return {**known, "mean": total.mean[0], "covariance": total.covariance[0]}


def fisher(model: nn.Module, need: Need) -> Recorder:
    """Diagonal Fisher information of the parameters of the layers named, from the model's own predictions.

    The square of a batch's *mean* gradient, averaged over batches: it shrinks as the batch grows, so a weight of the
    penalty belongs to its batch size. A batch of one is left out where layers normalise by the batch.

    Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022.

    Returns:
        one tensor a parameter, under its name in the model.
    """
    names = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in need.layers]
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    total = [torch.zeros_like(p) for p in parameters]
    batches = 0
    while (batch := (yield)) is not None:
        images, _ = batch
        if len(images) < 2 and need.statistics == "batch":
            continue
        logits = logits_of(model(images))
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), parameters, allow_unused=True)
        total = [t if g is None else t + g.square() for t, g in zip(total, gradients, strict=True)]
        batches += 1
    if not batches:
        raise ValueError("No source batch holds two images or more, so there are no batch statistics to normalise by.")
    return {name: value / batches for name, value in zip(names, total, strict=True)}


def replay(model: nn.Module, need: Need) -> Recorder:
    """Source images themselves, to be shown to the model again; a file of such statistics holds source data.

    Setting ``samples`` keeps a random sample of so many (Vitter, "Random Sampling with a Reservoir", ACM TOMS 1985), or
    all if there are no more.

    Returns:
        ``images`` (images, 3, height, width), uint8, rounded to whole steps of 1/255; ``labels`` (images,), int64, -1 where
        none are asked for.
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


def shift_network(model: nn.Module, need: Need) -> Recorder:
    """The weights of a :class:`tta.shift.ShiftNetwork`, trained on the features and labels of all source images.

    Returns:
        its state, and ``prior`` (classes,), the share of images that a class has.
    """
    known: list[tuple[Tensor, Tensor]] = []
    classes = 0
    while (batch := (yield)) is not None:
        assert batch[1] is not None
        features, logits = _features(model, need, batch[0])
        known.append((features, batch[1]))
        classes = logits.shape[1]
    features, labels = (torch.cat(parts) for parts in zip(*known, strict=True))
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"A source label lies outside 0 to {classes - 1}, the classes of the model.")
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
        fisher,
        replay,
        shift_network,
    )
}


def layer_moments(x: Tensor, rectified: bool) -> tuple[Tensor, Tensor]:
    """:func:`~tta.functional.batch_moments` of a layer's output, or of what a ReLU makes of it."""
    return batch_moments(x.relu() if rectified else x)


def _features(model: nn.Module, need: Need, images: Tensor) -> tuple[Tensor, Tensor]:
    (layer,) = need.layers
    with torch.no_grad():
        return taps.look(model, layer, images)


# ---------------------------------------------------------------------- statistics


@dataclass(frozen=True, eq=False)
class Entry:
    """One recorded need: its settings, over how many images, and what was found."""

    need: Need
    images: int
    known: Known


@dataclass(frozen=True, eq=False)
class SourceStatistics:
    """What was recorded of the source domain with one model; deployment needs this and no source image.

    Attributes:
        model: fingerprint of the weights it was recorded with; with other weights it is refused.
        entries: one for each need.

    Example:
        >>> import torch, tta
        >>> from tta.methods import source_needs
        >>> model, images = tta.load_model("digits-cnn"), torch.rand(128, 3, 32, 32)
        >>> statistics = tta.SourceStatistics.record(model, source_needs(model, "eata"), images)
        >>> adapter = tta.adapt(model, "eata", source=statistics)
    """

    model: str
    entries: tuple[Entry, ...]

    @classmethod
    def record(
        cls,
        model: nn.Module,
        needs: Sequence[Need],
        source: "Images",
        *,
        batch_size: int = BATCH_SIZE,
        num_workers: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> "SourceStatistics":
        """Show the source images to (a copy of) the model, once.

        Args:
            model: the source model.
            needs: what to record; ``tta.methods.source_needs(model, "eata")`` says what a method needs.
            source: a tensor or dataset of images, uint8 or floating point in [0, 1], split in order into the batches
                that each need asks for; or an iterable of batches, which keep their own size. Labels are ignored
                unless a need asks for them.
            batch_size: for needs that ask for none.
            num_workers: processes that read a dataset ahead.
            progress: wraps the iterable of batches, such as ``rich.progress.track``.

        Raises:
            ValueError: no images, images without the labels that a need asks for, or an unknown kind.
            TypeError: ``source`` gives something that is not a batch of images.
        """
        models = {mode: _copy(model, mode) for mode in dict.fromkeys(need.statistics for need in needs)}
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        batches, regroup = _batches(source, batch_size, num_workers)
        feeds = [_Feed(models[n.statistics], n, (n.batch_size or batch_size) if regroup else None) for n in needs]
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for batch in progress(batches):
                images, labels = _checked(batch)
                for feed in feeds if len(images) else ():
                    feed.take(images, labels, device)
            return cls(fingerprint.of_model(model), tuple(feed.finish(device) for feed in feeds))

    def get(self, need: Need) -> Known:
        """What was recorded for a need.

        Raises:
            ValueError: it was not recorded, or under other settings; the message says which.
        """
        return self._entry(need).known

    def select(self, needs: Sequence[Need]) -> "SourceStatistics":
        """The entries that the needs ask for, in their order; raises as :meth:`get` does."""
        return SourceStatistics(self.model, tuple(self._entry(need) for need in needs))

    def check(self, model: str) -> None:
        """Raise a ValueError unless the statistics were recorded with the weights of this fingerprint."""
        if self.model != model:
            raise ValueError(
                f"The source statistics were recorded with other weights: fingerprint {self.model[:12]}... there, "
                f"{model[:12]}... in this model. Record them again with this model."
            )

    def describe(self) -> list[dict[str, Any]]:
        """For a manifest: the needs with their settings, over how many images, and a hash of what was found."""
        return [
            {
                **asdict(entry.need),
                "images": entry.images,
                "content": fingerprint.of_tensors(sorted(entry.known.items())),
            }
            for entry in self.entries
        ]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tensors, the model's fingerprint and the settings."""
        entries = [{"need": asdict(entry.need), "images": entry.images} for entry in self.entries]
        tensors = {
            f"{number}.{name}": value.cpu().contiguous()
            for number, entry in enumerate(self.entries)
            for name, value in entry.known.items()
        }
        save_file(tensors, path, {"source_statistics": "1", "model": self.model, "entries": json.dumps(entries)})

    @classmethod
    def load(cls, path: str | Path) -> "SourceStatistics":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"No source statistics at '{path}': `tta source` or SourceStatistics.save writes them."
            )
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"'{path}' does not hold source statistics ({error}).") from error
        if header.get("source_statistics") != "1":
            raise ValueError(f"'{path}' does not hold source statistics, or was written by another version.")
        entries = []
        for number, entry in enumerate(json.loads(header["entries"])):
            prefix = f"{number}."
            need = Need(**{**entry["need"], "layers": tuple(entry["need"]["layers"])})
            known = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            entries.append(Entry(need, entry["images"], known))
        return cls(header["model"], tuple(entries))

    def _entry(self, need: Need) -> Entry:
        same_kind = [entry for entry in self.entries if entry.need.kind == need.kind]
        for entry in same_kind:
            if not need.differences(entry.need):
                return entry
        if same_kind:
            nearest: list[str] = min((need.differences(entry.need) for entry in same_kind), key=len)
            reason = "; ".join(nearest)
        else:
            reason = f"they hold {', '.join(sorted({entry.need.kind for entry in self.entries})) or 'nothing'}"
        raise ValueError(
            f"The source statistics do not hold the {need.kind} asked for: {reason}. Record them again for the method as "
            "it is set up here, or set it up as it was when they were recorded."
        )


Images: TypeAlias = Tensor | Dataset[Any] | Iterable[Any]
Source: TypeAlias = Images | SourceStatistics | str | Path


def known_from(
    source: Source, model: nn.Module, model_fingerprint: str, needs: Sequence[Need], batch_size: int
) -> SourceStatistics:
    """Statistics that hold just the needs, in their order: recorded from images, or looked up and checked.

    Raises:
        ValueError: recorded with another model or under other settings, or images that do not fit.
    """
    if isinstance(source, (str, Path)):
        source = SourceStatistics.load(source)
    if not isinstance(source, SourceStatistics):
        return SourceStatistics.record(model, needs, source, batch_size=batch_size)
    source.check(model_fingerprint)
    return source.select(needs)


class _Feed:
    """Hands images to one need's recorder in batches of the size it asks for (None: as they come)."""

    def __init__(self, model: nn.Module, need: Need, batch_size: int | None) -> None:
        if need.kind not in KINDS:
            raise ValueError(f"No kind of source statistics '{need.kind}'. There are: {', '.join(KINDS)}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"The batch size of the source images is 1 or more; got {batch_size}.")
        self._need, self._batch_size, self._images = need, batch_size, 0
        self._recorder = KINDS[need.kind](model, need)
        self._waiting: Batch | None = None  # images too few for a batch yet
        next(self._recorder)

    def take(self, images: Tensor, labels: Tensor | None, device: torch.device) -> None:
        if not self._need.labels:
            labels = None
        elif labels is None:
            raise ValueError(f"{self._need.kind} needs labelled source images: pass batches (images, labels).")
        if not self._images and self._batch_size is None and self._need.batch_size is not None:
            self._need = replace(self._need, batch_size=len(images))
        self._images += len(images)
        if self._waiting is not None:
            before, labels_before = self._waiting
            images = torch.cat([before, images])
            labels = None if labels is None or labels_before is None else torch.cat([labels_before, labels])
        size = self._batch_size or len(images)
        whole = len(images) - len(images) % size
        for start in range(0, whole, size):
            self._send(_cut(images, labels, slice(start, start + size)), device)
        self._waiting = _cut(images, labels, slice(whole, None)) if whole < len(images) else None

    def finish(self, device: torch.device) -> Entry:
        if not self._images:
            raise ValueError(f"The source holds no images. Expected {EXPECTED}.")
        if self._waiting is not None:
            self._send(self._waiting, device)
        try:
            self._recorder.send(None)
        except StopIteration as stop:
            return Entry(self._need, self._images, stop.value)
        raise AssertionError(f"The recorder of {self._need.kind} goes on after its last batch.")

    def _send(self, batch: Batch, device: torch.device) -> None:
        images, labels = batch[0].to(device), None if batch[1] is None else batch[1].to(device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        self._recorder.send((images.clone() if images.is_inference() else images, labels))


def _cut(images: Tensor, labels: Tensor | None, part: slice) -> Batch:
    return images[part], None if labels is None else labels[part]


def _batches(source: Images, batch_size: int, num_workers: int) -> tuple[Iterable[Any], bool]:
    """The source as batches, and whether these may be regrouped: those of a user's own loader may not."""
    if isinstance(source, Tensor):
        return _checked(source)[0].split(batch_size), True
    if isinstance(source, Dataset) and not hasattr(source, "__iter__"):
        return DataLoader(source, batch_size=batch_size, num_workers=num_workers), True
    return source, False


def _checked(batch: Any) -> Batch:
    pair = batch if isinstance(batch, (tuple, list)) else (batch, None)
    images, labels = pair[0], pair[1] if len(pair) > 1 else None
    if not isinstance(images, Tensor) or images.dim() != 4:
        given = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"Expected as the source {EXPECTED}; found {given} in place of a batch of images.")
    return images, labels


def _copy(model: nn.Module, statistics: str) -> nn.Module:
    duplicate = copy.deepcopy(model).eval().requires_grad_(False)
    if statistics == "batch":
        for _, layer in norms.named_layers(duplicate, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
    return duplicate
