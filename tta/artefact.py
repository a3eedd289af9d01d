"""Artefacts: a plain model as one file, ONNX, torch.export's or weights alone, that is run before it gets its name."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from tta import places
from tta.functional import logits_of

Run = Callable[[Tensor], Tensor]  # images (batch, channels, height, width) -> logits (batch, classes)
TOLERANCE = 1e-3  # of the largest logit, 1 at least; rounding of other kernels is below 1e-5
FACTS = "tta.json"  # name of the facts within a .pt2 file
IMAGES, LOGITS = "images", "logits"  # input and output of an ONNX graph
OPSET = 17  # read by every onnxruntime since 1.12


class Agreement(NamedTuple):
    """Comparison of an artefact with the adapter: images, equal predictions, largest difference of a logit, and what is allowed."""

    images: int
    equal: int
    difference: float
    allowed: float


class Disagreement(ValueError):
    """An artefact that does not compute what the adapter predicts."""


def check_format(path: Path) -> None:
    """Raise an error for a file whose suffix is of no format, or one that needs a library that is missing.

    Raises:
        ValueError: the suffix is none of ``.onnx``, ``.pt2`` and ``.safetensors``.
        ModuleNotFoundError: ``.onnx`` without the extra ``export``; the message says what to install.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"'{path.name}' says no format: expected a name that ends in {', '.join(FORMATS)}.")
    missing = [name for name in ("onnx", "onnxruntime") if not find_spec(name)]
    if path.suffix == ".onnx" and missing:
        raise ModuleNotFoundError(
            f"An .onnx file needs {', '.join(missing)}: pip install 'tta-toolkit[export]'. "
            "The formats .pt2 and .safetensors need nothing more."
        )


def write(
    path: str | Path, plain: nn.Module, images: Tensor, expected: Tensor, facts: Mapping[str, Any], *, source: nn.Module
) -> Agreement:
    """Write a plain model to a file, whole or not at all, after the file's content was run and compared.

    The content is made in memory, read back, and run on the first image alone and on the others, so that the number of
    images is seen to be free. Then it is written beside and renamed.

    Args:
        path: its suffix is the format: ``.onnx``; ``.pt2``, of :func:`torch.export.save`; ``.safetensors``, the weights alone.
        plain: a result of :meth:`tta.Adapter.export`, on the CPU.
        images: two or more, (batch, channels, height, width), as the model takes them.
        expected: logits that the adapter predicts of them, (batch, classes).
        facts: what the file shall say of itself, as values that JSON knows, by name.
        source: the source model, into a copy of which weights alone are loaded to be run; it is not changed.

    Raises:
        Disagreement: the logits differ by more than :data:`TOLERANCE` of the largest; nothing is written.
        ValueError: the model cannot be written in this format, or :func:`check_format` refuses.
        OSError: the file cannot be written; a file that is there stays as it is.
    """
    path = Path(path)
    check_format(path)
    made, opened = FORMATS[path.suffix]
    with _quiet():
        try:
            content = made(plain, images, facts)
        except Exception as error:  # of the exporter, which knows no common class
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(f"{type(plain).__name__} cannot be written as {path.suffix}: {reason}") from error
        found = compared(opened(content, source), images, expected)
    if not found.difference <= found.allowed:  # NaN is no agreement
        raise Disagreement(
            f"The {path.suffix} file does not compute what the adapter predicts: on {found.images} images {found.equal} "
            f"predictions agree, logits differ by up to {found.difference:.2g}, and {found.allowed:.2g} is allowed. It was "
            "not written."
        )
    places.write(path, lambda stream: stream.write(content))
    return found


@torch.no_grad()
def compared(run: Run, images: Tensor, expected: Tensor) -> Agreement:
    """The agreement of a model with the logits that are expected, on the first image and on the others apart."""
    found = torch.cat([run(part).detach().float() for part in (images[:1], images[1:])])
    return Agreement(
        len(images),
        int((found.argmax(1) == expected.argmax(1)).sum()),
        float((found - expected).abs().max()),
        TOLERANCE * max(1.0, float(expected.abs().max())),
    )


# ---------------------------------------------------------------------- what a file says of itself


def facts_of(path: str | Path) -> dict[str, Any]:
    """The facts in an artefact: model, method and its settings, preprocessing, names of the classes.

    Raises:
        ValueError: a suffix of no format; or the file says nothing, as one of another origin.
        ModuleNotFoundError: an ``.onnx`` file without the extra ``export``.
    """
    path = Path(path)
    check_format(path)
    texts = READERS[path.suffix](path)
    if not texts:
        raise ValueError(f"'{path}' says nothing of itself: it is not a file of `tta export`.")
    return {name: json.loads(text) for name, text in texts.items()}


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as text by name, the only kind that ONNX and safetensors hold."""
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}


def _texts_of_onnx(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def _texts_of_program(path: Path) -> dict[str, str]:
    held = {FACTS: ""}
    torch.export.load(path, extra_files=held)
    texts: dict[str, str] = json.loads(held[FACTS] or "{}")
    return texts


def _texts_of_weights(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


# ---------------------------------------------------------------------- the formats


def _onnx(plain: nn.Module, images: Tensor, facts: Mapping[str, Any]) -> bytes:
    """An ONNX graph with a free number of images.

    The exporter that traces: of the two it alone runs on every torch since 2.6 without a further library.
    """
    import onnx

    out: Any = io.BytesIO()  # declared to be a path, which that of the other exporter must be
    torch.onnx.export(
        _Logits(plain),
        (_example(images),),
        out,
        dynamo=False,
        opset_version=OPSET,
        input_names=[IMAGES],
        output_names=[LOGITS],
        dynamic_axes={IMAGES: {0: "batch"}, LOGITS: {0: "batch"}},
    )
    graph = onnx.load_from_string(out.getvalue())
    onnx.helper.set_model_props(graph, _texts(facts))
    onnx.checker.check_model(graph)
    content: bytes = graph.SerializeToString()
    return content


def _opened_onnx(content: bytes, source: nn.Module) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([LOGITS], {IMAGES: images.numpy()})[0])


def _program(plain: nn.Module, images: Tensor, facts: Mapping[str, Any]) -> bytes:
    """A program of torch.export with a free number of images."""
    out = io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(_Logits(plain), (_example(images),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, out, extra_files={FACTS: json.dumps(_texts(facts))})
    return out.getvalue()


def _opened_program(content: bytes, source: nn.Module) -> Run:
    run: Run = torch.export.load(io.BytesIO(content)).module()
    return run


def _example(images: Tensor) -> Tensor:
    """Two black images to export with: a .pt2 file keeps them, and it shall hold no picture of a user's."""
    return torch.zeros(2, *images.shape[1:])


def _weights(plain: nn.Module, images: Tensor, facts: Mapping[str, Any]) -> bytes:
    """The state_dict, under the names of the source model."""
    state = {name: value.detach().cpu().clone().contiguous() for name, value in plain.state_dict().items()}
    return save(state, _texts(facts))


def _opened_weights(content: bytes, source: nn.Module) -> Run:
    model = copy.deepcopy(source).eval()
    model.load_state_dict(load(content))
    return lambda images: logits_of(model(images))


class _Logits(nn.Module):
    """A model whose forward gives logits alone, also where the model's own gives an object with ``.logits``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()  # the exporters put the mode back that they find here, into the model's layers too

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this context the exporters say nothing: what they warn of is checked by running the result."""
    log = logging.getLogger("torch")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


FORMATS: dict[
    str, tuple[Callable[[nn.Module, Tensor, Mapping[str, Any]], bytes], Callable[[bytes, nn.Module], Run]]
] = {
    ".onnx": (_onnx, _opened_onnx),
    ".pt2": (_program, _opened_program),
    ".safetensors": (_weights, _opened_weights),
}
READERS: dict[str, Callable[[Path], dict[str, str]]] = {
    ".onnx": _texts_of_onnx,
    ".pt2": _texts_of_program,
    ".safetensors": _texts_of_weights,
}
