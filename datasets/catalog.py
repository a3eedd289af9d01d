"""Streams and protocols by name: ``tta.stream``."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tta.datasets.boxes import DatasetBoxes
from tta.datasets.domains import Classes, DatasetImages, Domain, targets_in
from tta.datasets.files import FileImages, FilesDataset, class_numbers, list_flat, list_images, subfolders
from tta.datasets.geometry import fitted
from tta.datasets.masks import VOID, DatasetMasks
from tta.datasets.numbers import DatasetNumbers
from tta.datasets.protocols import PROTOCOLS
from tta.datasets.stream import Stream, check

# name -> (module of this folder, whose function `domains`, or the one after the colon, makes the domains; description)
STREAMS = {
    "cifar10-c": ("cifar_c", "CIFAR-10-C as published, or generated from clean CIFAR-10"),
    "cifar100-c": ("cifar_c:cifar100", "CIFAR-100-C as published, or generated from clean CIFAR-100"),
    "cifar10.1": ("cifar10_1", "CIFAR-10.1, new test images of CIFAR-10's classes"),
    "imagenet-c": ("imagenet_c", "ImageNet-C as published, all images or those of a list"),
    "imagenet-3dcc": ("imagenet_c:three_d", "ImageNet-3DCC as published, twelve corruptions in three dimensions"),
    "tiny-imagenet-c": ("imagenet_c:tiny", "Tiny-ImageNet-C as published"),
    "imagenet-a": ("imagenet_shifts:imagenet_a", "ImageNet-A, natural images of 200 classes, scored within them"),
    "imagenet-r": ("imagenet_shifts:imagenet_r", "ImageNet-R, renditions of 200 classes, scored within them"),
    "imagenet-v2": ("imagenet_shifts:imagenet_v2", "ImageNet-V2, matched frequency"),
    "imagenet-sketch": ("imagenet_shifts:imagenet_sketch", "ImageNet-Sketch, drawings of all 1000 classes"),
    "caltech101": ("fine_grained:caltech101", "Caltech101: CoOp's test split, for vision-language models"),
    "pets": ("fine_grained:pets", "Oxford Pets: CoOp's test split, for vision-language models"),
    "cars": ("fine_grained:cars", "Stanford Cars: CoOp's test split, for vision-language models"),
    "flowers102": ("fine_grained:flowers102", "Oxford Flowers: CoOp's test split, for vision-language models"),
    "food101": ("fine_grained:food101", "Food-101: CoOp's test split, for vision-language models"),
    "aircraft": ("fine_grained:aircraft", "FGVC Aircraft, variants: CoOp's test split, for vision-language models"),
    "sun397": ("fine_grained:sun397", "SUN397: CoOp's test split, for vision-language models"),
    "dtd": ("fine_grained:dtd", "Describable Textures: CoOp's test split, for vision-language models"),
    "eurosat": ("fine_grained:eurosat", "EuroSAT: CoOp's test split, for vision-language models"),
    "ucf101": ("fine_grained:ucf101", "UCF101, the middle frames: CoOp's test split, for vision-language models"),
    "domainnet-126": ("domain_folders:domainnet_126", "DomainNet-126: clip art, paintings, photographs, sketches"),
    "pacs": ("domain_folders:pacs", "PACS: photographs, art paintings, cartoons, sketches"),
    "officehome": ("domain_folders:officehome", "Office-Home: art, clip art, products, photographs"),
    "imagefolder": ("imagefolder", "your own folder CLASS/IMAGE, or DOMAIN/CLASS/IMAGE"),
    "imagefolder-c": ("imagefolder:corrupted", "your own folder CLASS/IMAGE, corrupted as the images are needed"),
    "camvid": ("driving:camvid", "CamVid, clean or corrupted: a class of every pixel (segmentation)"),
    "cityscapes": ("driving:cityscapes", "Cityscapes, clean or corrupted (segmentation)"),
    "acdc": ("driving:acdc", "ACDC: fog, night, rain, snow (segmentation)"),
    "carla-tta": ("driving:carla_tta", "CarlaTTA: simulated drives through changing weather (segmentation)"),
    "shift": ("driving:shift", "SHIFT: simulated sequences of changing weather (segmentation)"),
    "voc": ("scenes:voc", "Pascal VOC 2012, clean or corrupted (segmentation)"),
    "ade20k-c": ("scenes:ade20k_c", "ADE20K under fifteen corruptions (segmentation)"),
    "maskfolder": ("scenes:maskfolder", "your own folders of pictures and masks, clean or corrupted (segmentation)"),
    "kitti-weather": ("objects:kitti_weather", "KITTI in rendered fog, rain and snow: boxes (detection)"),
    "coco-c": ("objects:coco_c", "COCO under fifteen corruptions: boxes (detection)"),
    "digits-boxes": ("digits_boxes", "canvases of digits: a box around each (detection), embedded"),
    "digits-c": ("digits_c", "scikit-learn's digits, 800 held-out images, corrupted as they are needed"),
    "digits-mosaic": ("digits_mosaic", "canvases of digits: a class of every pixel (segmentation), embedded"),
    "digits-open": ("digits_open", "digits-c for a model of the digits 0 to 7; 8 and 9 are unknown classes"),
}


# Settings omitted from the manifest: the domains' entries have the model's hash, the others do not change the stream.
NOT_IN_MANIFEST = ("model", "cache", "progress")
BY_CLASS = (
    "correlated",
    "ptta",
    "label-shift",
    "ccc",
    "outliers",
    "feedback",
)  # protocols that need one class an image
TASKS = ("classification", "segmentation", "regression", "detection")  # of streams


def stream(
    name: str | Mapping[str, Dataset[Any]],
    *,
    batch_size: int = 64,
    seed: int = 0,
    protocol: str = "continual",
    task: str | None = None,
    **settings: Any,
) -> Stream:
    """A target stream by name, or over your own datasets.

    Args:
        name: one of ``tta list streams``, or a mapping from domain names to datasets of ``(image, label)``, with
            ``task="segmentation"`` of ``(image, mask)``, with ``task="regression"`` of ``(image, numbers)``, with
            ``task="detection"`` of ``(image, {"boxes": ..., "labels": ...})``.
        batch_size: samples per batch.
        seed: of everything that is drawn (corruptions, orders).
        protocol: one of ``tta list protocols``; one that orders by class is refused where an image has no class.
        task: ``"classification"``, ``"segmentation"``, ``"regression"`` or ``"detection"``; left out: that of the named stream, classification of your own
            datasets. Datasets of masks have a setting ``ignore_index``, the value of void pixels (255; None: there is none).
        settings: settings of the stream, such as ``severity=5`` or ``corruptions=["fog"]``, and parameters of the
            protocol, such as ``delta=0.1``; see :mod:`tta.datasets.protocols`.

    Raises:
        ValueError: an unknown stream, protocol or setting; the message suggests the nearest name.

    Example:
        >>> import tta
        >>> len(tta.stream("digits-c", severity=5, batch_size=200))
        60
        >>> print(tta.stream("digits-c", corruptions=["fog"], protocol="correlated", delta=0.1))
        digits-c: 13 batches of up to 64, 800 samples, protocol correlated (reset never), seed 0
          images generated by the cifar recipe, severity 5, seed 0, from scikit-learn's digits
          fog                  batches 0-12          800 samples
    """
    if protocol not in PROTOCOLS:
        raise ValueError(_unknown("protocol", protocol, PROTOCOLS))
    if isinstance(name, str) and name not in STREAMS:
        raise ValueError(_unknown("stream", name, STREAMS))
    own = protocol_settings(protocol)
    of_protocol = {key: value for key, value in settings.items() if key in own}
    of_stream = {key: value for key, value in settings.items() if key not in own}
    for key, value in of_protocol.items():
        _check_type(f"{key} of protocol '{protocol}'", value, own[key])
    if task is not None and task not in TASKS:
        raise ValueError(_unknown("task of a stream", task, list(TASKS)))
    domains = _domains(name, protocol, seed, of_stream, task)
    check(domains, batch_size)
    _check_task(name, domains, protocol, task)
    build, reset = PROTOCOLS[protocol]
    rows, schedule = build(domains, seed, batch_size, **of_protocol)
    return Stream(
        name if isinstance(name, str) else "custom",
        rows,
        batch_size=schedule.batch_size,
        seed=seed,
        protocol=schedule.protocol or protocol,
        reset=reset,
        settings={key: _for_manifest(value) for key, value in settings.items() if key not in NOT_IN_MANIFEST},
        schedule=schedule,
    )


def _domains(
    name: str | Mapping[str, Dataset[Any]], protocol: str, seed: int, settings: dict[str, Any], task: str | None
) -> Sequence[Domain]:
    """The domains of a named stream, or those of a user's datasets."""
    if isinstance(name, str):
        known = stream_settings(name, protocol)
        for key in settings:
            if key not in known:
                raise ValueError(_unknown(f"setting of stream '{name}', protocol '{protocol}':", key, known))
        return _maker(name)(seed=seed, **settings)
    masks = {"ignore_index": settings.pop("ignore_index", VOID)} if task == "segmentation" else {}
    if settings:
        raise ValueError(
            f"A stream over your own datasets has no setting '{next(iter(settings))}'; its protocol '{protocol}' has: "
            f"{', '.join(protocol_settings(protocol)) or 'none'}."
        )
    if task == "segmentation":
        return [DatasetMasks(domain, dataset, **masks) for domain, dataset in name.items()]
    kinds = {"regression": DatasetNumbers, "detection": DatasetBoxes}
    if task in kinds:
        return [kinds[task](domain, dataset) for domain, dataset in name.items()]
    return [DatasetImages(domain, dataset) for domain, dataset in name.items()]


def _check_task(name: Any, domains: Sequence[Domain], protocol: str, task: str | None) -> None:
    """Raise a ValueError for another task than the stream's, or a protocol that its labels cannot serve."""
    found = targets_in(domains[0])[0]
    if task not in (None, found):
        raise ValueError(f"Stream '{name}' is of {found}; got task={task!r}.")
    if found != "classification" and protocol in BY_CLASS:
        has = {"segmentation": "has a class for every pixel", "regression": "has numbers and no class"}
        has |= {"detection": "has boxes of several classes"}
        raise ValueError(
            f"Protocol '{protocol}' needs one class an image; a picture of stream '{name if isinstance(name, str) else 'custom'}' "
            f"{has[found]}. Protocols without classes order domains and pictures alone, such as continual or recurring."
        )


def source_images(
    name: str,
    preprocessing: Mapping[str, Any] | None = None,
    *,
    on_error: str = "raise",
    exif: bool = True,
    class_order: str | None = None,
    stream: Mapping[str, Any] | None = None,
) -> Tensor | Dataset[Any]:
    """Clean images of the source domain, for :meth:`tta.SourceStatistics.record` and ``source=``.

    Args:
        name: a stream (the images on which its source models were trained), or a folder ``CLASS/IMAGE``, or a folder of
            images without classes, which then have no labels. A folder is shuffled, always in the same way, so that its
            first images are of all classes.
        preprocessing: of the model. A folder's images of another size than the model's input are resized and cropped as
            its weights expect, see :func:`tta.datasets.geometry.fitted`. Default: they are not changed.
        on_error: a file that cannot be used raises an error on access (``"raise"``), or is left out (``"skip"``).
        exif: turn pictures of a folder as their EXIF orientation says.
        class_order: ``"text"`` or ``"number"``, for class folders that are numbers, as for ``imagefolder``.
        stream: settings of a stream some of whose domains are for training, such as ``held_out="sketch"`` of ``pacs``.

    Raises:
        FileNotFoundError: a folder without images.
        ValueError: the stream offers no source images, or ``name`` is neither a stream nor a folder.
    """
    if stream and name in STREAMS and hasattr(_module(name), "training_images"):
        training: Dataset[Any] = _module(name).training_images(name, **stream)
        return training
    if stream:
        raise ValueError(f"'{name}' has no setting '{next(iter(stream))}' for its training images.")
    if name in STREAMS:
        make: Callable[[], Dataset[Any]] | None = getattr(_module(name), "source_images", None)
        if make is None:
            raise ValueError(
                f"Stream '{name}' offers no source images. Name a folder of images, or statistics saved by `tta source`, as source=PATH."
            )
        return make()
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(_unknown("folder of images or stream", name, STREAMS))
    classes = subfolders(folder)
    files = list_images(folder, classes, class_numbers(classes, class_order)) if classes else list_flat(folder)
    files = files[torch.randperm(len(files), generator=torch.Generator().manual_seed(0))]
    images = FileImages("source", folder, files, partial(fitted, preprocessing=preprocessing or {}), exif=exif)
    return FilesDataset(images.without_unreadable() if on_error == "skip" else images)


def classes_of(name: str) -> Classes | None:
    """The classes of a stream, None if they are not known without its images."""
    known: Mapping[str, Classes] = getattr(_module(name), "CLASSES_OF", {})
    return known.get(name)


def task_of(name: str) -> str | None:
    """Name of the task of a stream, None of one for classification, whose models are recognised by their outputs."""
    task: str | None = getattr(_module(name), "TASK", None)
    return task


def class_names(name: str) -> Sequence[str]:
    """Names of the classes of a stream in their order; empty where they are not known without its data."""
    if name not in STREAMS:
        return ()
    known: Mapping[str, Sequence[str]] = getattr(_module(name), "CLASS_NAMES", {})
    return known.get(name, ())


def _module(name: str) -> ModuleType:
    return import_module(f"tta.datasets.{STREAMS[name][0].partition(':')[0]}")


def _maker(name: str) -> Callable[..., Sequence[Domain]]:
    make: Callable[..., Sequence[Domain]] = getattr(_module(name), STREAMS[name][0].partition(":")[2] or "domains")
    return make


def stream_settings(name: str, protocol: str = "continual") -> list[str]:
    """Names of a stream's settings, those of its protocol included, without batch size, seed and protocol."""
    make = _maker(name)
    own = protocol_settings(protocol) if protocol in PROTOCOLS else {}
    return [*(key for key in inspect.signature(make).parameters if key != "seed"), *own]


def protocol_settings(name: str) -> dict[str, Any]:
    """Names and types of a protocol's own parameters."""
    parameters = inspect.signature(PROTOCOLS[name].build).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}


def _for_manifest(value: Any) -> Any:
    """A setting as the manifest shows it: a dataset by its class name, since the domains hash its content."""
    if isinstance(value, Mapping):
        return {key: _for_manifest(item) for key, item in value.items()}
    is_dataset = hasattr(value, "__getitem__") and not isinstance(value, (str, list, tuple))
    return type(value).__name__ if is_dataset else value


def _check_type(what: str, value: Any, kind: Any) -> None:
    if kind is Any or isinstance(value, kind) or (isinstance(value, int) and isinstance(float(value), kind)):
        return
    raise ValueError(f"{what} is of type {getattr(kind, '__name__', kind)}; got {value!r}.")


def _unknown(what: str, given: str, known: Mapping[str, Any] | list[str]) -> str:
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f" Did you mean '{match[0]}'?" if match else ""
    return f"No {what} '{given}'.{hint} There are: {', '.join(known)}."
