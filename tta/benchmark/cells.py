"""Cells: single runs of a benchmark. Each is a pure function of its description and has a folder for its result or failure."""

import dataclasses
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
from typing import TYPE_CHECKING, Any

from tta import places
from tta.benchmark import runs
from tta.benchmark.settings import OF_MACHINE, OF_MODEL, RunSettings
from tta.report.tables import BASELINE
from tta.results import Result

if TYPE_CHECKING:
    from tta.datasets.stream import Stream

# What a stream is made from. The model is among it: protocol ccc calibrates on it.
OF_STREAM = ("stream", "stream_settings", "protocol", "seed", "model", *OF_MODEL, "batch_size", "reset")
NAME_LENGTH = 120  # letters of a folder's name before the hash; file systems take 255 bytes


@dataclass(frozen=True, kw_only=True)
class Cell(RunSettings):
    """One run: one method on one model and one stream, with one seed. None stands for the stream's or the method's own.

    Attributes:
        method: its name.
        hparams: hyper-parameters, over the preset.
        stream: its name.
        stream_settings: settings of the stream and of its protocol.
        oracle_steps: as in :func:`tta.evaluate`.
        consistency: whether the run measures how consistent predictions are, see :class:`tta.engine.Consistency`.
    """

    method: str
    hparams: Mapping[str, Any] = field(default_factory=dict)
    stream: str
    stream_settings: Mapping[str, Any] = field(default_factory=dict)
    oracle_steps: int = 0
    consistency: bool = False

    def describe(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as plain JSON values; defaults are left out.

        A new setting therefore changes the name of no cell that leaves it at its default.
        """
        fields = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = {} if item.default_factory is dict else item.default
            if item.name not in OF_MACHINE and value != default:
                fields[item.name] = value
        described: dict[str, Any] = json.loads(json.dumps(fields))
        return described

    @property
    def name(self) -> str:
        """Name of the cell's folder: readable words and a hash of the whole description."""
        settings = [f"{key}={value}" for key, value in self.hparams.items()]
        oracle = ["oracle"] * (self.oracle_steps > 0)
        words = [self.stream, self.protocol, *oracle, self.model or "", self.method, *settings, f"seed{self.seed}"]
        readable = "_".join(filter(None, (re.sub(r"[^\w.=+-]+", "-", word).strip("-") for word in words)))
        text = json.dumps(self.describe(), sort_keys=True)
        return f"{readable[:NAME_LENGTH]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def request(self) -> runs.Request:
        """The request that ``tta run`` would make of it."""
        return runs.Request(
            stream=self.stream,
            methods=[self.method],
            run=self,
            stream_settings=dict(self.stream_settings),
            hparams={self.method: dict(self.hparams)},
        )


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result: the error in one line, and its traceback."""

    reason: str
    traceback: str = ""


Outcome = Result | Failure


def run_cell(cell: Cell) -> Outcome:
    """Run one cell; an error becomes a :class:`Failure`."""
    from tta.engine import Consistency

    try:
        request = cell.request
        described = {name: value for name, value in cell.describe().items() if name in OF_STREAM}
        stream = _stream(json.dumps(described, sort_keys=True))
        made = dict(runs.make_adapters(runs.source_models(request, stream), request))
        adapter = made[cell.method]  # beside it a vision-language model has its zero-shot error, a cell of its own
        consistency = Consistency()
        result = runs.run_adapter(
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
        return Failure(runs.error_message(error).splitlines()[0], traceback.format_exc())


@lru_cache(maxsize=1)
def _stream(described: str) -> "Stream":
    """The stream of a description; the last one is kept with its images, since cells on one stream follow one another."""
    return runs.make_stream(Cell(method=BASELINE, **json.loads(described)).request)


# ---------------------------------------------------------------------- on disk


def read(folder: Path, cell: Cell) -> Outcome | None:
    """The outcome of a cell on disk: its result or its failure. None if missing, incomplete or of another description."""
    return _read(folder / cell.name, cell)


def _read(home: Path, cell: Cell) -> Outcome | None:
    try:
        if json.loads((home / "cell.json").read_text(encoding="utf-8")) != cell.describe():
            return None
        if (home / "result.json").is_file():
            return Result.load(home)
        return Failure(**json.loads((home / "failed.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write(folder: Path, cell: Cell, outcome: Outcome) -> None:
    """Write a cell's outcome atomically: into a folder beside it, which is then renamed. Any number of processes may.

    A result that is there already stays: it is of the same description.
    """
    part = places.unfinished(folder / cell.name)
    try:
        part.mkdir(parents=True)
        (part / "cell.json").write_text(json.dumps(cell.describe(), indent=2) + "\n", encoding="utf-8")
        if isinstance(outcome, Failure):
            text = json.dumps(dataclasses.asdict(outcome), indent=2)
            (part / "failed.json").write_text(text + "\n", encoding="utf-8")
        else:
            outcome.save(part)
        _place(part, folder, cell)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # gone, if it has become the cell's folder
    for left_over in places.abandoned(folder / cell.name):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)


def _place(part: Path, folder: Path, cell: Cell) -> None:
    """Rename what was written to the cell's folder, unless a result is there."""
    home = folder / cell.name
    while not isinstance(read(folder, cell), Result):
        try:
            os.rename(part, home)
        except OSError:
            if not home.exists() and part.exists():
                raise  # nothing was in the way
        else:
            return
        aside = places.unfinished(folder / cell.name)
        try:
            os.rename(home, aside)  # a failure, or something incomplete
        except FileNotFoundError:  # another process did
            continue
        if isinstance(_read(aside, cell), Result) and not home.exists():  # finished by another process meanwhile
            os.rename(aside, home)
        shutil.rmtree(aside, ignore_errors=True)
