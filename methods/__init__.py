"""The methods, one file each, found by their file names; and ``tta.adapt``."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tta import compiling, config, distributed, fingerprint, tasks
from tta.adapter import FORMAT, KINDS, Adapter, Config, Outputs, config_class, own, saving, unwrap
from tta.guard import Guard, Guardian
from tta.messages import nearest
from tta.norms import SmallBatches
from tta.source import Need, SourceLike

ENTRY_POINTS = "tta.methods"
DEFAULT = "auto"


def available(task: str | None = None, two_towers: bool | None = None) -> list[str]:
    """Names of all methods: the files of this folder and those that installed packages add, sorted.

    Args:
        task: only those that serve the task of this name, see :mod:`tta.tasks`.
        two_towers: only those that need a vision-language model, see :class:`tta.TwoTowers`; ``False``: only the others.

    Raises:
        ValueError: no such task.
    """
    own = {file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")}
    names = sorted(own | set(metadata.entry_points(group=ENTRY_POINTS).names))
    if task is not None:
        served = tasks.find(task).name
        names = [name for name in names if served in find(name).tasks]
    return names if two_towers is None else [name for name in names if find(name).two_towers == two_towers]


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


def has_source_stage(kind: type[Adapter]) -> bool:
    """Whether a method's source model is trained with an auxiliary part, by ``tta train``."""
    return hasattr(kind, "source_losses")


def is_prepared(kind: type[Adapter], model: nn.Module) -> bool:
    """Whether a model's checkpoint holds the auxiliary part of a method."""
    carried = getattr(kind, "carried", None)
    return carried is not None and carried(model) is not None


def adapt(
    model: nn.Module,
    method: str | type[Adapter] | None = None,
    *,
    source: SourceLike | None = None,
    preset: str | Mapping[str, Any] | None = None,
    copy: bool = True,
    outputs: Outputs = "logits",
    task: str | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    small_batches: SmallBatches | None = None,
    guard: bool | Guard | Mapping[str, Any] | None = None,
    process_group: distributed.ProcessGroup | None = None,
    compile: bool = False,
    **hparams: Any,
) -> Adapter:
    """Wrap a source model with a test-time adaptation method.

    Args:
        model: maps images (batch, channels, height, width) to logits (batch, classes), or to what another task has: maps of
            logits, numbers, boxes. It is copied, never changed.
        method: a name of :func:`available`, or an ``Adapter`` subclass of your own. Left out: ``auto``, guarded.
        source: source images or statistics of them: a tensor or dataset of images (split in order into batches of
            ``source_batch_size``), an iterable of batches (they keep their size; labels are ignored), a
            :class:`tta.SourceStatistics`, or the path of a saved one. A method that needs none ignores it.
        preset: name of a benchmark whose published settings to start from (``"cifar10-c"``), or the settings.
        copy: ``False`` adapts the caller's own module in place.
        outputs: ``"logits"``; ``"probabilities"``, of which the logarithm is taken; ``"sigmoid"``, logits of labels that do not
            exclude one another, or of one class against its absence; or a function that makes logits of the model's output.
            The adapter returns logits.
        task: ``"classification"``, ``"segmentation"``, ``"detection"`` or ``"regression"``, see :mod:`tta.tasks`. Left out:
            classification, or where the outputs of the first batch can be nothing else segmentation (four dimensions) or
            detection (dictionaries of boxes, labels, scores). Regression must be said: numbers look like logits.
        on_bad: ``"raise"`` refuses a batch in which an image holds NaN or infinity; ``"skip"`` answers the good images, learns
            from them alone, and gives NaN logits for the others. On a GPU this waits for the batch.
        small_batches: for methods that normalise by the batch: ``"blend"`` takes n / (n + 16) of the statistics of n images and
            the rest of the source's, ``"source"`` the source's below 8 images, ``"raise"`` refuses those. Left out, a batch
            below 8 is warned of once.
        guard: ``True``, or a :class:`tta.Guard` with settings: watch the adapter without labels, go back and hold learning when
            it becomes worse than the source model, and let the source model answer meanwhile. It costs an eighth of a
            forward a batch, and a copy of the model. Left out: a guard where ``method`` is left out too.
        process_group: of :mod:`torch.distributed`, whose workers share one stream: each is given its part of every batch, see
            :meth:`tta.adapter.Adapter.join`. ``tta list methods`` says which methods can.
        compile: compile the forward and backward pass of the model by ``torch.compile``, at the second batch, which then takes a
            minute or more. Results differ by rounding. ``docs/performance.md`` says where it pays.
        hparams: hyper-parameters of the method; they override the preset.

    Returns:
        An adapter: ``logits = adapter(images)`` predicts and learns.

    Raises:
        ConfigError: an unknown method, preset or hyper-parameter, or a value that does not fit.
        ValueError: the model lacks the layers that the method adapts; ``source`` is missing or does not fit; or the method
            cannot share a stream; or there is no compiler to compile with, or a forward that was put on the model itself.

    Example:
        >>> import torch, tta
        >>> adapter = tta.adapt(tta.load_model("digits-cnn"))
        >>> adapter(torch.rand(8, 3, 32, 32)).shape
        torch.Size([8, 10])
        >>> adapter = tta.adapt(tta.load_model("digits-cnn"), "tent", lr=1e-3)
    """
    if compile:
        compiling.check()
    kind, settings = _configured(method or DEFAULT, preset, hparams)
    guarded = Guard.of(method is None if guard is None else guard)
    frozen = None if guarded is None else own(unwrap(model), copied=True)  # before the method may change the model
    with distributed.said_once(process_group):
        adapter = kind(
            model,
            settings,
            source=source,
            copy=copy,
            outputs=outputs,
            task=task,
            on_bad=on_bad,
            small_batches=small_batches,
        )
    adapter.method = name_of(kind)
    adapter.preset = preset if isinstance(preset, str) else None
    if guarded is not None and frozen is not None:
        adapter.guard = Guardian(frozen, guarded, adapter)
    if compile:
        compiling.compile_forwards(adapter, adapter.model)
    if process_group is not None:
        adapter.join(process_group)
    return adapter


def load(
    path: str | Path,
    model: nn.Module,
    method: type[Adapter] | None = None,
    *,
    strict: bool = True,
    process_group: distributed.ProcessGroup | None = None,
    **hparams: Any,
) -> Adapter:
    """An adapter around a model as :meth:`tta.Adapter.save` wrote it: it goes on as if it had never stopped.

    Args:
        path: the file.
        model: the source model, with the weights that the adapter was built on.
        method: the class, if it is one of your own.
        strict: ``False`` takes other source weights too, with a warning.
        process_group: as in :func:`adapt`; a state of one worker is that of several, and the reverse.
        hparams: settings that a file cannot hold, such as a callable ``augment``, and ``compile``.

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
    state, header, statistics = saving.read(path, FORMAT)
    settings = {**saving.plain_settings(header["config"]), **hparams}
    if statistics is not None and not strict:
        statistics = replace(statistics, model=fingerprint.of_model(unwrap(model)))
    served = {name: header.get(name) for name in ("small_batches", "task")} | {"guard": header.get("guard") or False}
    if header.get("outputs") in KINDS:
        served["outputs"] = header["outputs"]
    with saving.fitting(path):
        kind = method or find(header["method"])
        adapter = adapt(model, kind, source=statistics, **{**served, **settings})
        adapter.load_state_dict(state, strict=strict)
    if process_group is not None:
        adapter.join(process_group)
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
