"""The methods, one file each, found by their file names; and ``tta.adapt``."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tta import config, fingerprint
from tta.adapter import KINDS, Adapter, Config, Outputs, config_class, saving, unwrap
from tta.messages import nearest
from tta.norms import SmallBatches
from tta.source import Need, SourceLike

ENTRY_POINTS = "tta.methods"


def available() -> list[str]:
    """Names of all methods: the files of this folder and those that installed packages add, sorted."""
    own = {file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")}
    return sorted(own | set(metadata.entry_points(group=ENTRY_POINTS).names))


def is_known(name: str) -> bool:
    """Whether there is a method of this name, or one that wraps another (``gala:tent``)."""
    return all(part in available() for part in name.split(":"))


def find(name: str) -> type[Adapter]:
    """The class of a method: the one ``Adapter`` subclass that its file defines.

    For ``gala:tent`` it is the result of ``wrap``, a function in the first method's file, for the class of the second.

    Raises:
        ConfigError: no method of that name (the nearest one is offered), or the first method wraps no other.
    """
    outer, colon, inner = name.partition(":")
    if colon:
        module = import_module(find(outer).__module__)
        if not hasattr(module, "wrap"):
            raise config.ConfigError(f"'{outer}' wraps no other method: there is no '{name}'.")
        wrapped: type[Adapter] = module.wrap(find(inner))
        return wrapped
    if name not in available():
        raise config.ConfigError(
            f"No method '{name}'.{nearest(name, available())} There are: {', '.join(available())}."
        )
    if name in metadata.entry_points(group=ENTRY_POINTS).names:
        added: type[Adapter] = metadata.entry_points(group=ENTRY_POINTS)[name].load()
        return added
    module = import_module(f"tta.methods.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Adapter) and value.__module__ == module.__name__
    )
    return found


def adapt(
    model: nn.Module,
    method: str | type[Adapter],
    *,
    source: SourceLike | None = None,
    preset: str | Mapping[str, Any] | None = None,
    copy: bool = True,
    outputs: Outputs = "logits",
    on_bad: Literal["raise", "skip"] = "raise",
    small_batches: SmallBatches | None = None,
    **hparams: Any,
) -> Adapter:
    """Wrap a source classifier with a test-time adaptation method.

    Args:
        model: maps images (batch, channels, height, width) to logits (batch, classes). It is copied, never changed.
        method: a name of :func:`available`, or an ``Adapter`` subclass of your own.
        source: source images or statistics of them: a tensor or dataset of images (split in order into batches of
            ``source_batch_size``), an iterable of batches (they keep their size; labels are ignored), a
            :class:`tta.SourceStatistics`, or the path of a saved one. A method that needs none ignores it.
        preset: name of a benchmark whose published settings to start from (``"cifar10-c"``), or the settings.
        copy: ``False`` adapts the caller's own module in place.
        outputs: ``"logits"``; ``"probabilities"``, of which the logarithm is taken; ``"sigmoid"``, logits of labels that do not
            exclude one another, or of one class against its absence; or a function that makes logits of the model's output.
            The adapter returns logits.
        on_bad: ``"raise"`` refuses a batch in which an image holds NaN or infinity; ``"skip"`` answers the good images, learns
            from them alone, and gives NaN logits for the others. On a GPU this waits for the batch.
        small_batches: for methods that normalise by the batch: ``"blend"`` takes n / (n + 16) of the statistics of n images and
            the rest of the source's, ``"source"`` the source's below 8 images, ``"raise"`` refuses those. Left out, a batch
            below 8 is warned of once.
        hparams: hyper-parameters of the method; they override the preset.

    Returns:
        An adapter: ``logits = adapter(images)`` predicts and learns.

    Raises:
        ConfigError: an unknown method, preset or hyper-parameter, or a value that does not fit.
        ValueError: the model lacks the layers that the method adapts, or ``source`` is missing or does not fit.

    Example:
        >>> import torch, tta
        >>> adapter = tta.adapt(tta.load_model("digits-cnn"), "tent", lr=1e-3)
        >>> adapter(torch.rand(8, 3, 32, 32)).shape
        torch.Size([8, 10])
    """
    kind, settings = _configured(method, preset, hparams)
    adapter = kind(
        model, settings, source=source, copy=copy, outputs=outputs, on_bad=on_bad, small_batches=small_batches
    )
    adapter.method = name_of(kind)
    adapter.preset = preset if isinstance(preset, str) else None
    return adapter


def load(
    path: str | Path, model: nn.Module, method: type[Adapter] | None = None, *, strict: bool = True, **hparams: Any
) -> Adapter:
    """An adapter around a model as :meth:`tta.Adapter.save` wrote it: it goes on as if it had never stopped.

    Args:
        path: the file.
        model: the source model, with the weights that the adapter was built on.
        method: the class, if it is one of your own.
        strict: ``False`` takes other source weights too, with a warning.
        hparams: settings that a file cannot hold, such as a callable ``augment``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else or is damaged, or the weights are others; the message says what differs.

    Example:
        >>> import tempfile, torch, tta
        >>> adapter = tta.adapt(tta.load_model("digits-cnn"), "tent")
        >>> path = tempfile.mkdtemp() + "/adapter.safetensors"
        >>> adapter.save(path)
        >>> tta.load(path, tta.load_model("digits-cnn")).method
        'tent'
    """
    state, header, statistics = saving.read(path)
    kind = method or find(header["method"])
    settings = {**saving.plain_settings(header["config"]), **hparams}
    if statistics is not None and not strict:
        statistics = replace(statistics, model=fingerprint.of_model(unwrap(model)))
    served = {"small_batches": header.get("small_batches")}
    if header.get("outputs") in KINDS:
        served["outputs"] = header["outputs"]
    adapter = adapt(model, kind, source=statistics, **{**served, **settings})
    try:
        adapter.load_state_dict(state, strict=strict)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"'{path}' does not fit this model: {error}") from error
    return adapter


def source_needs(
    model: nn.Module, method: str | type[Adapter], *, preset: str | Mapping[str, Any] | None = None, **hparams: Any
) -> list[Need]:
    """The source statistics that a method needs with this model, for :meth:`tta.SourceStatistics.record`.

    Args and errors are those of :func:`adapt`.
    """
    kind, settings = _configured(method, preset, hparams)
    return kind.source_needs(model, settings)


def _configured(
    method: str | type[Adapter], preset: str | Mapping[str, Any] | None, hparams: Mapping[str, Any]
) -> tuple[type[Adapter], Config]:
    kind = find(method) if isinstance(method, str) else method
    if not (inspect.isclass(kind) and issubclass(kind, Adapter)):
        raise TypeError(f"method is the name of a method or a subclass of tta.Adapter; got {method!r}.")
    presets = (getattr(kind, "wrapped", None) or kind).__module__.rpartition(".")[2]
    settings = config.preset(presets, preset) if isinstance(preset, str) else preset or {}
    return kind, config.build(config_class(kind), settings, hparams)


def name_of(kind: type[Adapter]) -> str:
    """The name that tables show: the file name of a known method, the class name of a user's own; ``gala:tent``."""
    stem = kind.__module__.rpartition(".")[2]
    if wrapped := getattr(kind, "wrapped", None):
        return f"{stem}:{name_of(wrapped)}"
    return stem if kind.__module__ == f"tta.methods.{stem}" else kind.__name__
