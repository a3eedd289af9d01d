"""A whole source stage: model and images in, one file out."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tta import auxiliary_file, config, methods, places
from tta.adapter import config_class
from tta.hyperparameters import as_dict
from tta.messages import trainer_silenced
from tta.precision import warn_if_slow
from tta.training.data import collated, loaders, require_labels
from tta.training.module import Best, Resumable, SourceModule
from tta.training.settings import TrainSettings

PLAIN = "source"  # training without an auxiliary part
SAME_NUMBERS = ("num_workers", "logger", "save_every")  # settings that may change when a training is resumed


class Trained(NamedTuple):
    """Outcome of a source stage.

    Attributes:
        path: of the file.
        steps: made in all.
        error: of the weights in the file on the images that were held out, %; None without any.
    """

    path: Path
    steps: int
    error: float | None


def train(
    method: str,
    model: nn.Module,
    data: Dataset[Any] | tuple[Tensor, Tensor],
    out: str | Path,
    *,
    settings: TrainSettings | Mapping[str, Any] | None = None,
    progress: bool = True,
    logger: Logger | Sequence[Logger] | bool | None = None,
    callbacks: Sequence[Callback] = (),
    **hparams: Any,
) -> Trained:
    """Train a classifier with the auxiliary part of a method, and write both as one file.

    A training that was stopped, by a crash too, goes on from its last checkpoint (``FILE.resume``) when it is called again; on a
    CPU it ends with the same weights, bit for bit. The checkpoint is removed at the end.

    Args:
        method: of ``tta list methods``, one with a source stage (``ttt``, ``clust3`` ...); ``"source"`` trains the classifier alone.
        model: it is trained in place, from the weights that it has; in the end it is on the CPU, in ``eval()`` mode.
        data: images with labels: (images, labels), or a dataset of pairs; images uint8 or in [0, 1].
        out: the file, ``.safetensors``; one that is there is replaced.
        settings: of the training.
        progress: show a progress bar.
        logger: any Lightning logger(s) in place of the one that the settings name.
        callbacks: further Lightning callbacks.
        hparams: hyper-parameters of the method that say how its part is made, such as ``split=``.

    Raises:
        ValueError: a method without a source stage, a model that is no classifier, settings that do not fit, a label that is no
            class of the model, a checkpoint of another training, or weights that are not finite in the end.
        SystemExit: stopped by SIGTERM or Ctrl+C; the same call resumes.

    Example:
        >>> import tempfile, tta
        >>> from tta import training
        >>> from tta.datasets import digits
        >>> images, labels, _ = digits.split("train")
        >>> model = tta.load_model("digits-cnn", pretrained=False)
        >>> file = tempfile.mkdtemp() + "/mine.safetensors"
        >>> done = training.train("ttt", model, (images, labels), file, settings={"epochs": 1, "augment": "crop"}, progress=False)
        >>> adapter = tta.adapt(tta.load_model("digits-cnn", checkpoint=file), "ttt")
    """
    wanted = settings if isinstance(settings, TrainSettings) else config.build(TrainSettings, settings or {})
    kind, method_config = configured(method, wanted, hparams)
    file = Path(out)
    if file.suffix != ".safetensors":
        raise ValueError(f"The file of a source stage is called *.safetensors; got '{file}'.")
    images = TensorDataset(*data) if isinstance(data, tuple) else data
    classes = _classes(model, images)
    require_labels(images)
    with places.tried(file, is_file=True), isolate_rng(), trainer_silenced(), _determinism_restored():
        pl.seed_everything(wanted.seed, verbose=False)
        part = None
        if kind is not None:
            part = kind.make_auxiliary(model, method_config, torch.Generator().manual_seed(wanted.seed))
        training, held = loaders(images, wanted, classes)
        module = SourceModule(model, part, kind, method_config, wanted, wanted.epochs * len(training))
        training.batch_sampler.done = lambda: module.global_step  # type: ignore[union-attr]
        module.train()
        resume = file.with_name(f"{file.name}.resume")
        module.facts = facts = {
            "method": method,
            "model": getattr(model, "spec", type(model).__name__),
            "images": len(images),  # type: ignore[arg-type]
            "hparams": hparams_of(kind, method_config),
            "training": plain(wanted),
        }
        _check_resumed(resume, facts)
        best = [Best()] if wanted.patience else []
        trainer = _trainer(wanted, file, progress, logger, [*callbacks, *best, Resumable(resume, wanted.save_every)])
        warn_if_slow(wanted.precision, trainer.strategy.root_device)
        trainer.fit(module, training, held, ckpt_path=str(resume) if resume.is_file() else None, **_trusted())
        if trainer.interrupted or trainer.received_sigterm:
            raise SystemExit(1)
        if best and best[0].weights:
            module.load_state_dict(best[0].weights)
            error: float | None = best[0].error
        else:
            found = trainer.callback_metrics.get("validation_error")
            error = None if found is None else float(found)
        _check_finite(module, resume)
        module.eval().cpu()
        _write(file, module, method, facts, error, trainer.global_step)
        resume.unlink(missing_ok=True)
    return Trained(file, trainer.global_step, error)


def configured(method: str, settings: TrainSettings, hparams: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class and the hyper-parameters of a method with a source stage; (None, None) for plain training.

    Raises:
        ValueError: there is no such method, or it has no source stage.
    """
    if method == PLAIN:
        if hparams:
            raise ValueError(f"Plain training has no key '{next(iter(hparams))}'.")
        return None, None
    if settings.label_smoothing:
        raise ValueError(
            f"label_smoothing={settings.label_smoothing} is of plain training; '{method}' has losses of its own."
        )
    kind = methods.find(method)
    if not methods.has_source_stage(kind):
        having = ", ".join(
            [PLAIN, *(name for name in methods.available() if methods.has_source_stage(methods.find(name)))]
        )
        raise ValueError(f"Method '{method}' has no source stage: it adapts any classifier. There are: {having}.")
    kinds = config_class(kind)
    names = getattr(kind, "made_by", ())
    if strange := next((key for key in hparams if key not in names), None):
        raise ValueError(
            f"'{strange}' does not say how the part of '{method}' is made.{config.nearest(strange, names)} There are: {', '.join(names)}."
        )
    if unnamed := next((key for key, value in hparams.items() if callable(value)), None):
        raise ValueError(
            f"{unnamed} is a callable, which a file cannot hold. Give one of the names that '{method}' knows."
        )
    shared = {"augment": settings.augment} if "augment" in names and isinstance(settings.augment, str) else {}
    return kind, config.build(kinds, {**shared, **hparams})


def plain(settings: TrainSettings) -> dict[str, Any]:
    """Settings as JSON values; a callable by its name, which is the same in every process."""
    found = as_dict(settings)
    if callable(settings.augment):
        found["augment"] = getattr(settings.augment, "__qualname__", type(settings.augment).__qualname__)
    return found


def hparams_of(kind: Any, method_config: Any) -> dict[str, Any]:
    """The hyper-parameters that say how a method's part is made, as JSON values."""
    return {} if kind is None else {name: as_dict(method_config)[name] for name in kind.made_by}


def _trainer(
    settings: TrainSettings, file: Path, progress: bool, logger: Any, callbacks: Sequence[Callback]
) -> pl.Trainer:
    if logger is None:
        makers: dict[str, Any] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
        logs = {"save_dir": file.parent, "name": f"{file.name}.logs", "version": ""}
        logger = makers[settings.logger](**logs) if settings.logger in makers else False
    patience = [EarlyStopping("validation_error", patience=settings.patience)] if settings.patience else []
    return pl.Trainer(
        max_epochs=settings.epochs,
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]  # a str, checked with the settings
        logger=logger,
        callbacks=[*([RichProgressBar(leave=False)] if progress else []), *patience, *callbacks],
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=False,
        deterministic="warn",
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )


@contextmanager
def _determinism_restored() -> Iterator[None]:
    """Set torch's switches of determinism back afterwards: the trainer sets them for the whole process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _trusted() -> dict[str, Any]:
    """The argument by which newer releases of Lightning are told that a checkpoint is ours."""
    return {"weights_only": False} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}


def _check_resumed(resume: Path, facts: Mapping[str, Any]) -> None:
    """Raise a ValueError if there is a checkpoint of another training: of other settings, of another model or number of images."""
    if not resume.is_file():
        return
    there = torch.load(resume, map_location="cpu", weights_only=False).get("source_stage", {})
    ours, theirs = (
        {key: of.get(key) for key in ("method", "model", "images")} | of.get("hparams", {}) | of.get("training", {})
        for of in (facts, there)
    )
    if differing := sorted(key for key in ours if ours[key] != theirs.get(key) and key not in SAME_NUMBERS):
        raise ValueError(
            f"'{resume}' is of a training with another {', '.join(differing)}. Give the same to resume it, or delete it to begin anew."
        )


def _check_finite(module: nn.Module, resume: Path) -> None:
    """Raise a ValueError if the training has diverged, so that no such weights are written; a checkpoint would lead there again."""
    if wrong := next((name for name, value in module.state_dict().items() if not value.isfinite().all()), None):
        resume.unlink(missing_ok=True)
        raise ValueError(
            f"The training has diverged: '{wrong}' is not finite, and no file is written. A lower lr= usually helps."
        )


def _classes(model: nn.Module, data: Dataset[Any]) -> int:
    """Number of classes of a model, from its output for the first image.

    Raises:
        ValueError: it predicts something else than one class an image.
    """
    first = data[0]
    (image,), _ = collated([(first[0] if isinstance(first, (tuple, list)) else first, 0)], 1)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            output = model.eval()(image[None].to(next(model.parameters()).device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"The model's output for one image is {found}; a source stage trains classifiers, and expected logits (1, classes). "
            "For segmentation, `ttt_mae` trains its decoder itself on a folder of images, source=FOLDER, or is given one, auxiliary=."
        )
    return int(logits.shape[1])


def _write(
    file: Path, module: SourceModule, method: str, facts: Mapping[str, Any], error: float | None, steps: int
) -> None:
    """Write the network inside its input normalisation, and the part."""
    model: Any = module.model
    network = model.model if hasattr(model, "preprocessing") else model
    about = {
        "model": facts["model"],
        "preprocessing": getattr(model, "preprocessing", None),
        "training": facts["training"],
        "validation_error": error,
        "steps": steps,
    }
    auxiliary_file.write(file, model, module.part, method, facts["hparams"], about, network)
