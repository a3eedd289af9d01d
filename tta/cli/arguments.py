"""Parse command-line arguments: streams, methods and settings, checked by name and type."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tta import config
from tta.benchmark import RunSettings, runs

STREAM = "digits-c"
RUN, OF_STREAM = "settings of the run", "settings of the stream"  # owners of keys beside the methods
DEFAULT = ("source", "auto")  # where no method is named, the second with a guard
MAIN = ("source", "norm", "tent", "eata", "sar", "cotta", "rotta", "actmad", "dpcore", "auto")
# `tta run` alone: a quarter of the images, and without the two methods that take longest after dpcore. 30 s at most on 2 cores.
DEMO = (STREAM, *(method for method in MAIN if method not in ("sar", "cotta")), "samples=200")


class UsageError(ValueError):
    """The command line asks for something that does not exist."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors into usage errors: while a run is being set up, they are the user's mistake and not a failed run."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error


def check_new(file: Path, force: bool) -> None:
    """Raise a UsageError for a file that is there, unless it is to be replaced: its making may have taken hours."""
    if file.is_file() and not force:
        raise UsageError(f"'{file}' exists: name another file, or replace it with --force.")


def parse_request(words: Sequence[str]) -> runs.Request:
    """Sort the words of ``tta run`` into stream, methods and settings, each checked by name and type.

    Raises:
        UsageError: a word that is neither a stream nor a method, or an unknown key; the nearest name is offered.
    """
    stream, methods = _stream_and_methods([word for word in words if "=" not in word])
    settings = [(key, text) for key, equals, text in (word.partition("=") for word in words) if equals]
    protocols = [text for key, text in settings if key in ("protocol", "stream.protocol")]
    run: dict[str, Any] = {}
    if not protocols and (own := config.load("stream", stream).get("protocol")):
        protocols, run["protocol"] = [own], own
    keys = _Keys.of(stream, methods, *protocols[-1:])
    of_stream: dict[str, Any] = {}
    hparams: dict[str, dict[str, Any]] = {name: {} for name in methods}
    owners = {RUN: run, OF_STREAM: of_stream, **hparams}
    for key, text in settings:
        for owner, name in keys.targets(key):
            owners[owner][name] = config.parse(text)
    if not set(words).intersection(methods):
        run.setdefault("guard", True)
    if run.get("reset") is not None:
        run["reset"] = str(run["reset"])
    return runs.Request(stream, methods, config.build(RunSettings, run), of_stream, hparams)


def _stream_and_methods(names: Sequence[str]) -> tuple[str, list[str]]:
    """Sort names into the stream and the methods; the embedded stream and the default method if none is named."""
    from tta import methods
    from tta.datasets import catalog

    streams = [name for name in names if name in catalog.STREAMS]
    chosen = [name for name in names if name not in catalog.STREAMS]
    if len(streams) > 1:
        raise UsageError(f"One run is on one stream; got {', '.join(streams)}.")
    for name in chosen:
        if not methods.is_known(name):
            known = [*catalog.STREAMS, *methods.available()]
            raise UsageError(
                f"'{name}' is neither a stream nor a method.{config.nearest(name, known)} "
                f"Streams: {', '.join(catalog.STREAMS)}. Methods: {', '.join(methods.available())}."
            )
    if repeated := {name for name in chosen if chosen.count(name) > 1}:
        raise UsageError(f"Method named twice: {', '.join(sorted(repeated))}.")
    return streams[0] if streams else STREAM, chosen or list(DEFAULT)


class _Keys(NamedTuple):
    """The keys that a run takes: its own, its stream's and its methods'."""

    stream: str
    of_run: list[str]
    of_stream: list[str]
    of_methods: dict[str, list[str]]

    @classmethod
    def of(cls, stream: str, chosen: Sequence[str], *protocol: str) -> "_Keys":
        """The keys of a run of these methods on this stream, with those of the protocol if it is named."""
        from tta import methods
        from tta.adapter import config_class
        from tta.datasets import catalog

        return cls(
            stream,
            [field.name for field in dataclasses.fields(RunSettings)],
            list(catalog.stream_settings(stream, *protocol)),
            {name: [field.name for field in dataclasses.fields(config_class(methods.find(name)))] for name in chosen},
        )

    def targets(self, key: str) -> list[tuple[str, str]]:
        """(owner, name) of all settings that a key stands for; the owner is ``RUN``, ``OF_STREAM`` or a method."""
        owner, dot, name = key.partition(".")
        having = [method for method, names in self.of_methods.items() if key in names]
        if dot:
            return [(self._owner(owner, name), name)]
        if key in self.of_run:
            return [(RUN, key)]
        if having:
            return [(method, key) for method in having]
        if key in self.of_stream:
            return [(OF_STREAM, key)]
        known = sorted({*self.of_run, *self.of_stream, *(k for names in self.of_methods.values() for k in names)})
        raise UsageError(
            f"No method of this run ({', '.join(self.of_methods)}) has a key '{key}', nor has the run or the stream."
            f"{config.nearest(key, known)}"
        )

    def _owner(self, owner: str, name: str) -> str:
        """The owner of a key OWNER.NAME."""
        if owner == "stream":
            known = [*self.of_stream, "seed", "protocol", "batch_size"]
            if name not in known:
                raise UsageError(f"Stream '{self.stream}' has no key '{name}'.{config.nearest(name, known)}")
            return OF_STREAM if name in self.of_stream else RUN
        if owner in self.of_methods:
            return owner  # a wrong name is reported by the method's own config
        known = ["stream", *self.of_methods]
        raise UsageError(
            f"'{owner}.{name}': '{owner}' is not in this run.{config.nearest(owner, known)} There are: {', '.join(known)}."
        )


def key_values(words: Sequence[str]) -> dict[str, Any]:
    """Settings KEY=VALUE as a mapping; a UsageError for a word of another form."""
    strange = next((word for word in words if "=" not in word), None)
    if strange is not None:
        raise UsageError(f"'{strange}' is not a setting: expected KEY=VALUE.")
    return {key: config.parse(text) for key, _, text in (word.partition("=") for word in words)}
