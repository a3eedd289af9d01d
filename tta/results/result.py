"""The result of a run: errors per domain and a manifest to reproduce them; saved, loaded and compared."""

import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from tta import places, tasks
from tta.messages import plain
from tta.results import curves
from tta.results import frames as frames_of
from tta.results.frames import Frame
from tta.results.predictions import Predictions

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
KEYS = ("schema", "method", "stream", "seed", "reset", "rows", "config", "manifest", "seconds", "skipped_updates")
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "stream", "reset", "task"), (str,)),
    **dict.fromkeys(("seed", "skipped_updates"), (int,)),
    **dict.fromkeys(("config", "manifest", "metrics"), (dict,)),
    "seconds": (int, float),
}
MEASURED = ("images_per_second", "peak_memory_mb")  # metrics that depend on the machine, too
LIBRARIES = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "scikit-learn", "tta-toolkit")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Errors in one domain. Counts, not rates: counts add up.

    Attributes:
        domain: its name.
        samples: number of scored samples; those of an unknown class are not scored. Of maps, pixels.
        errors: number of wrong predictions among them.
        sums: further sums that the score of the task is made of, see :class:`tta.tasks.Tally`; of maps ``"confusion"``, lists
            of pixels by true, then predicted class.
    """

    domain: str
    samples: int
    errors: int
    sums: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.domain, str):
            raise TypeError(f"a domain is a name, not {self.domain!r}")
        if not 0 <= self.errors <= self.samples:
            raise ValueError(
                f"Domain '{self.domain}': expected 0 <= errors <= samples; got {self.errors} errors and "
                f"{self.samples} samples."
            )

    @property
    def error(self) -> float:
        """Online error in percent, of maps that of the pixels; NaN if no sample was scored."""
        return 100.0 * self.errors / self.samples if self.samples else math.nan


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """The result of one run of a method on a stream, with a manifest to reproduce it.

    ``config`` and ``manifest`` become plain JSON values: tuples turn into lists, NaN into None, infinities into text
    (``"inf"``), objects without a JSON form into their ``repr``.

    Attributes:
        method: name of the method.
        stream: name of the stream.
        seed: of the stream's order and draws.
        reset: ``never``, ``domain``, ``batch`` or ``N batches``.
        rows: one per domain, in the order of arrival.
        config: the method's full configuration.
        manifest: everything needed to reproduce the run: model, data, order, precision, device, versions.
        seconds: wall-clock time of the run, reading of images included.
        skipped_updates: updates skipped because a loss or gradient was not finite.
        metrics: further measurements, see :func:`tta.evaluate`; empty in results of earlier versions.
        predictions: all predictions; not compared, and saved beside the JSON.
        task: name of the task, see :mod:`tta.tasks`; results of earlier versions are of classification.
        frames: some pictures of a run of maps or boxes, for :func:`tta.report.figures.maps`; not compared, and saved beside the
            JSON.

    Raises:
        ValueError: a repeated domain, negative or non-finite seconds, or predictions with other counts than the rows.
    """

    method: str
    stream: str
    seed: int
    reset: str
    rows: tuple[Row, ...]
    config: Mapping[str, Any] = field(hash=False)
    manifest: Mapping[str, Any] = field(hash=False)
    seconds: float
    skipped_updates: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict, hash=False)
    predictions: Predictions | None = field(default=None, compare=False)
    task: str = "classification"
    frames: tuple[Frame, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "config", _plain(self.config))
        object.__setattr__(self, "manifest", _plain(self.manifest))
        object.__setattr__(self, "metrics", _plain(self.metrics))
        tasks.find(self.task)
        names = [row.domain for row in self.rows]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"A result has one row a domain; repeated: {', '.join(repeated)}.")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"seconds is a finite time, 0 or more; got {self.seconds}.")
        if self.predictions is not None:
            self._check(self.predictions)

    def _check(self, predictions: Predictions) -> None:
        if len(predictions) and not 0 <= predictions.domain.min() <= predictions.domain.max() < len(self.rows):
            raise ValueError(f"predictions.domain is a position in the {len(self.rows)} rows; got others.")
        if self.task != "classification":
            for number, row in enumerate(self.rows):
                if not tasks.find(self.task).agrees(row, predictions.select(predictions.domain == number)):
                    raise ValueError(f"Domain '{row.domain}': the row and the predictions come from different runs.")
            return
        scored = predictions.domain[predictions.known]
        wrong = predictions.domain[predictions.known & ~predictions.correct]
        samples, errors = (np.bincount(values, minlength=len(self.rows)) for values in (scored, wrong))
        for row, n, e in zip(self.rows, samples, errors, strict=True):
            if (row.samples, row.errors) != (n, e):
                raise ValueError(
                    f"Domain '{row.domain}': the row says {row.errors} errors in {row.samples} samples, the predictions "
                    f"say {e} in {n}. They come from different runs."
                )

    @property
    def errors(self) -> dict[str, float]:
        """Online error of each domain in percent, in the order of arrival; NaN where the task has no wrong and right."""
        wrong = tasks.find(self.task).of_classes
        return {row.domain: row.error if wrong else math.nan for row in self.rows}

    @property
    def mean_error(self) -> float:
        """Mean online error in percent: the unweighted mean over domains, as the papers report.

        Every domain counts the same, whatever its number of samples; one without scored samples does not count. NaN where the
        task has no wrong and right: :attr:`score` is the number there.
        """
        return tasks.mean_of_known(self.errors.values())

    @property
    def score(self) -> tasks.Score:
        """The number that the run is judged by: its name, value, and whether more (``"up"``) or less (``"down"``) is better.

        Mean error in percent of a classifier; of maps the mean over domains of the mIoU in percent, where intersections and
        unions are summed over the images of a domain and void pixels are left out; of regression that of the mean absolute
        error, in the unit of the labels.
        """
        return tasks.find(self.task).score(self.rows)

    @property
    def scores(self) -> dict[str, float]:
        """The score of each domain, in the order of arrival: :attr:`errors` of a classifier."""
        return {row.domain: tasks.find(self.task).value(row) for row in self.rows}

    @property
    def samples(self) -> int:
        """Samples scored, over all domains; of maps, pixels."""
        return sum(row.samples for row in self.rows)

    def metric(self, name: str) -> float | None:
        """A number of :attr:`metrics` by its dotted name, or ``samples``; None if it is missing or undefined."""
        if name == "samples":
            return self.samples
        value: Any = self.metrics
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value if isinstance(value, (int, float)) else None

    @property
    def curves(self) -> "pandas.DataFrame":
        """The run batch by batch, one row per batch, with the columns of :func:`tta.results.curves.per_batch`.

        Raises:
            ValueError: the result has no predictions, or those of an earlier version.
        """
        import pandas  # here, because it takes half a second and only curves need it

        if self.predictions is None:
            raise ValueError("Curves are computed from the predictions, which this result lacks: keep predictions.npz.")
        return pandas.DataFrame(curves.per_batch(self.predictions, [row.domain for row in self.rows]))

    def to_json(self) -> str:
        """The result without its predictions as a JSON object; ``null`` stands for an undefined error."""
        known = {
            "schema": SCHEMA,
            "method": self.method,
            "stream": self.stream,
            "seed": self.seed,
            "reset": self.reset,
            "task": self.task,
            "score": self.score._asdict(),
            "mean_error": self.mean_error,
            "errors": self.errors,
            "samples": self.samples,
            "seconds": self.seconds,
            "skipped_updates": self.skipped_updates,
            "metrics": self.metrics,
            "rows": [
                {"domain": row.domain, "samples": row.samples, "errors": row.errors}
                | ({"sums": row.sums} if row.sums else {})
                for row in self.rows
            ],
            "config": self.config,
            "manifest": self.manifest,
        }
        return json.dumps(_plain(known), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """The result that :meth:`to_json` wrote. Errors and their mean are computed again from the counts.

        Raises:
            ValueError: not JSON, a missing key, a value of another type, or a schema newer than this version supports.
        """
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"Not a result: invalid JSON ({error}). The file may be cut off; run again.") from None
        if not isinstance(found, dict):
            raise ValueError(f"Not a result: expected a JSON object, got {type(found).__name__}.")
        schema = found.get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise ValueError(
                f"The result has schema {schema}, this version of tta-toolkit reads up to {SCHEMA}: upgrade to read it."
            )
        if missing := [key for key in KEYS if key not in found]:
            raise ValueError(f"Not a result: missing key {', '.join(map(repr, missing))}.")
        try:
            rows = tuple(Row(**row) for row in found["rows"])
        except (TypeError, AttributeError) as error:
            raise ValueError(f"Not a result: a row has domain, samples and errors ({error}).") from None
        fields = {key: found[key] for key in KEYS if key not in ("schema", "rows")}
        fields["metrics"] = found.get("metrics", {})
        fields["task"] = found.get("task", "classification")
        for key, value in fields.items():
            if not isinstance(value, TYPES[key]) or isinstance(value, bool):
                kinds = " or ".join(kind.__name__ for kind in TYPES[key])
                raise ValueError(f"Not a result: '{key}' is {_shown(value)}; expected {kinds}.")
        return cls(rows=rows, **fields)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``result.json``, and with predictions also ``predictions.npz`` and ``curves.parquet``.

        The Parquet file holds :attr:`curves` for other programs; ``frames.npz`` the pictures that were kept, if any. Each file
        appears complete or not at all, ``result.json`` last.

        Args:
            folder: created if it does not exist; an existing result in it is replaced.

        Returns:
            The path of ``result.json``.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        arrays, table, kept = target / "predictions.npz", target / "curves.parquet", target / "frames.npz"
        columns: dict[str, Any] = {} if self.predictions is None else dict(self.predictions.columns())
        if columns:
            places.write(arrays, lambda stream: np.savez_compressed(stream, **columns))
        else:
            arrays.unlink(missing_ok=True)
        if self.predictions is not None and any(columns.keys() >= set(needed) for needed in curves.KINDS):
            by_batch = curves.per_batch(self.predictions, [row.domain for row in self.rows])
            places.write(table, lambda stream: curves.write_parquet(by_batch, stream))
        else:
            table.unlink(missing_ok=True)
        if self.frames:
            places.write(kept, lambda stream: frames_of.save(self.frames, stream))
        else:
            kept.unlink(missing_ok=True)
        text = self.to_json().encode()
        return places.write(target / "result.json", lambda stream: stream.write(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Result":
        """The result that :meth:`save` wrote, with its predictions and frames if they are beside it.

        Args:
            path: the folder, or the ``result.json`` in it.

        Raises:
            FileNotFoundError: no result there.
            ValueError: not a result, see :meth:`from_json`, damaged frames, or predictions of another run.
        """
        file = Path(path)
        file = file / "result.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"No result at {file}. Expected a folder that Result.save wrote, or its result.json."
            )
        try:
            result = cls.from_json(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: Not a result: not a text ({error}).") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        result = replace(result, frames=_frames_beside(file))
        arrays = file.with_name("predictions.npz")
        if not arrays.is_file():
            return result
        try:
            with np.load(arrays, allow_pickle=False) as columns:
                predictions = Predictions(**{name: columns[name] for name in columns.files})
        except Exception as error:  # a damaged file makes zip and numpy raise anything
            raise ValueError(
                f"{arrays}: not the predictions of a result ({_first_line(error)}). Without this file the result is read "
                "without its predictions."
            ) from error
        try:
            return replace(result, predictions=predictions)  # the constructor compares their counts with the rows
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error

    def __str__(self) -> str:
        return plain(
            f"{self.method} on {self.stream}: mean {self.score.name} {self._shown()} over {len(self.rows)} domains"
        )

    def _shown(self) -> str:
        task = tasks.find(self.task)
        return f"{task.shown(self.score.value)} {task.unit}".strip()

    def __repr__(self) -> str:
        return (
            f"Result(method={self.method!r}, stream={self.stream!r}, seed={self.seed}, reset={self.reset!r}, "
            f"{'mean_error' if self.score.name == 'error' else self.score.name}={self.score.value:.2f}, domains={len(self.rows)}, samples={self.samples})"
        )


def _frames_beside(file: Path) -> tuple[Frame, ...]:
    """The frames beside a ``result.json``; none where there is no such file."""
    kept = file.with_name("frames.npz")
    if not kept.is_file():
        return ()
    try:
        return frames_of.load(kept)
    except Exception as error:  # a damaged file makes zip and numpy raise anything
        raise ValueError(
            f"{kept}: not the frames of a result ({_first_line(error)}). Without this file the result is read without its pictures."
        ) from error


def find_results(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, on_error: str = "raise"
) -> list[Result]:
    """Every result below the folders given, each once, sorted by path within each.

    What lies in a folder whose name begins with a dot is left out: a benchmark writes there what is not finished.

    Args:
        paths: folders, or ``result.json`` files.
        on_error: ``"skip"``: a file that is not a result is left out, with a :class:`BrokenResultWarning` that names it.

    Raises:
        FileNotFoundError: a path that does not exist or holds no result.
        ValueError: a file that is not a result, named; with ``"skip"`` only if there is no other. Or another ``on_error``.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip'; got {on_error!r}.")
    files: dict[Path, None] = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        root = Path(path)
        below = (file for file in root.rglob("result.json") if not _is_unfinished(file.relative_to(root)))
        found = sorted(below) if root.is_dir() else [root] if root.is_file() else []
        if not found:
            what = "holds no result.json" if root.exists() else "does not exist"
            raise FileNotFoundError(f"{root} {what}. Expected the output of `tta run --out DIR` or Result.save.")
        files.update(dict.fromkeys(file.resolve() for file in found))
    results, refused = [], []
    for file in files:
        try:
            results.append(Result.load(file))
        except ValueError as error:
            refused.append(error)
            if on_error == "raise":
                raise
    if refused and not results:
        raise refused[0]
    for refusal in refused:
        warnings.warn(f"Left out: {refusal}", BrokenResultWarning, stacklevel=2)
    return results


class BrokenResultWarning(UserWarning):
    """Warning of a file that is not a result and was left out."""


def _is_unfinished(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _shown(value: Any) -> str:
    """A value in an error message: a long one by its type."""
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def differences(a: Result, b: Result) -> dict[str, tuple[Any, Any]]:
    """The fields in which two results differ, settings before errors, each with both values.

    Names are paths into the JSON of a result, such as ``manifest.environment.torch``; None stands for a missing field.
    The time of the runs is not compared.
    """
    first, second = (_flat(_comparable(result)) for result in (a, b))
    return {
        name: (first.get(name), second.get(name)) for name in {**first, **second} if first.get(name) != second.get(name)
    }


def _comparable(result: Result) -> dict[str, Any]:
    """The fields of a result that are compared, each once: first settings, then findings."""
    found: dict[str, Any] = {"skipped_updates": result.skipped_updates}
    found |= {"mean_error": result.mean_error, "errors": result.errors}
    if result.task != "classification":
        found |= {"task": result.task, "score": result.score._asdict(), "scores": result.scores}
    metrics = {key: value for key, value in result.metrics.items() if key not in MEASURED}
    settings = {key: getattr(result, key) for key in ("method", "stream", "seed", "reset", "config")}
    rest = {key: value for key, value in result.manifest.items() if key not in settings}
    return {**settings, "manifest": rest, **_plain(found), "metrics": metrics}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists, keyed by dotted path."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, part in items for key, leaf in _flat(part, f"{path}.{name}".lstrip(".")).items()}


def environment() -> dict[str, Any]:
    """Versions of the libraries, the platform, and the toolkit's git commit, for a manifest; never raises.

    Returns:
        ``python``, one key per library (None if not installed), ``platform``, ``commit``: None outside a checkout, ends
        with ``-dirty`` if tracked files differ.
    """
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {**versions, "platform": platform.platform(), "commit": _commit(Path(__file__).resolve().parents[2])}


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Without optional locks, so that parallel runs do not compete for the index.
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=quiet, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, equal to the value read back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value) if isinstance(value, PurePath) else repr(value)
