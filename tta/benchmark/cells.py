"""Cells: single runs of a benchmark, each a pure function of its description, finished or failed in a folder of its own."""

import dataclasses
import glob
import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tta.benchmark import runs
from tta.results import Result

OF_MODEL = ("checkpoint", "num_classes", "mean", "std")
OF_STREAM = ("stream", "stream_settings", "protocol", "seed", "model", *OF_MODEL, "batch_size", "reset")
NAME_LENGTH = 120  # of a folder, below the 255 bytes that file systems take


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: one method on one model and one stream, with one seed. What is not said is the stream's or method's own.

    Attributes:
        method: its name.
        hparams: hyper-parameters, over the preset.
        stream: its name.
        stream_settings: of the stream and of its protocol.
        protocol: its name.
        seed: of the stream.
        model: spec of the source model.
        checkpoint: weights of the source model.
        num_classes: as in :func:`tta.load_model`.
        mean: likewise.
        std: likewise.
        preset: published settings to start from; left out, those of the stream's name.
        source: file or folder of source knowledge.
        batch_size: samples a batch.
        reset: as in :func:`tta.evaluate`.
        precision: as in :func:`tta.evaluate`.
        clean: whether the error on the source domain is measured too.
        oracle_steps: as in :func:`tta.evaluate`.
        consistency: whether the run measures how consistent predictions are, see :class:`tta.engine.Consistency`.
        accelerator: where it runs, which makes no other cell of it.
        num_workers: processes that read ahead, likewise.
    """

    method: str
    hparams: Mapping[str, Any] = field(default_factory=dict)
    stream: str
    stream_settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = "continual"
    seed: int = 0
    model: str | None = None
    checkpoint: str | None = None
    num_classes: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    preset: str | None = None
    source: str | None = None
    batch_size: int | None = None
    reset: str | None = None
    precision: str = "32-true"
    clean: bool = False
    oracle_steps: int = 0
    consistency: bool = False
    accelerator: str = "auto"
    num_workers: int = 0

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on, as plain JSON values; what is left at its default is left out."""
        told = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = {} if item.default_factory is dict else item.default
            if item.name not in ("accelerator", "num_workers") and value != default:
                told[item.name] = value
        return json.loads(json.dumps(told))

    @property
    def name(self) -> str:
        """Name of its folder: words to read and a hash over the whole description."""
        settings = [f"{key}={value}" for key, value in self.hparams.items()]
        oracle = ["oracle"] * (self.oracle_steps > 0)
        words = [self.stream, self.protocol, *oracle, self.model or "", self.method, *settings, f"seed{self.seed}"]
        readable = "_".join(filter(None, (re.sub(r"[^\w.=+-]+", "-", word).strip("-") for word in words)))
        text = json.dumps(self.describe(), sort_keys=True)
        return f"{readable[:NAME_LENGTH]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def request(self) -> runs.Request:
        """The cell as ``tta run`` would be asked for it."""
        shared = {item.name: getattr(self, item.name) for item in dataclasses.fields(runs.RunConfig)}
        return runs.Request(
            stream=self.stream,
            methods=[self.method],
            run=runs.RunConfig(**shared),
            stream_settings=dict(self.stream_settings),
            hparams={self.method: dict(self.hparams)},
        )


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result: the error in a line, and where it came up."""

    reason: str
    traceback: str = ""


Outcome = Result | Failure


def run_cell(cell: Cell) -> Outcome:
    """Run one cell; an error is an outcome too."""
    from tta.engine import Consistency

    try:
        runs.keep_freed_memory()
        request = cell.request
        told = {name: value for name, value in cell.describe().items() if name in OF_STREAM}
        stream = _stream(json.dumps(told, sort_keys=True))
        ((_, adapter),) = runs.make_adapters(runs.load_models(request, stream), request)
        consistency = Consistency()
        result = runs.evaluate(
            adapter,
            stream,
            request.run,
            clean=stream.clean() if cell.clean else None,
            oracle_steps=cell.oracle_steps,
            callbacks=[consistency] if cell.consistency else [],
            progress=False,
        )
        if not cell.consistency:
            return result
        return dataclasses.replace(result, metrics={**result.metrics, "consistency": consistency.percent})
    except Exception as error:
        return Failure(runs.in_words(error).splitlines()[0], traceback.format_exc())


@lru_cache(maxsize=1)
def _stream(told: str) -> Any:
    """The stream of the last cells, with the images it has made: methods on one stream follow one another."""
    return runs.make_stream(Cell(method=runs.BASELINE, **json.loads(told)).request)


# ---------------------------------------------------------------------- on disk


def read(folder: Path, cell: Cell) -> Outcome | None:
    """What is on disk of a cell: its result, why it failed, or nothing that is whole and of this very description."""
    home = folder / cell.name
    try:
        if json.loads((home / "cell.json").read_text(encoding="utf-8")) != cell.describe():
            return None
        if (home / "result.json").is_file():
            return Result.load(home)
        return Failure(**json.loads((home / "failed.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write(folder: Path, cell: Cell, outcome: Outcome) -> None:
    """Put a cell's outcome on disk, whole or not at all: written beside, then renamed.

    A result that is there already stays: whoever wrote it ran the same description.
    """
    home = folder / cell.name
    part = folder / f".{cell.name}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "cell.json").write_text(json.dumps(cell.describe(), indent=2) + "\n", encoding="utf-8")
    if isinstance(outcome, Failure):
        text = json.dumps(dataclasses.asdict(outcome), indent=2)
        (part / "failed.json").write_text(text + "\n", encoding="utf-8")
    else:
        outcome.save(part)
    if isinstance(read(folder, cell), Result):
        shutil.rmtree(part)
    else:
        shutil.rmtree(home, ignore_errors=True)
        os.replace(part, home)
    for left_over in folder.glob(f".{glob.escape(cell.name)}.*"):  # of a process that was killed while writing
        shutil.rmtree(left_over, ignore_errors=True)
