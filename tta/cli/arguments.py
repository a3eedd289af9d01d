"""The words of the command line: streams, methods and settings, sorted and checked by name and type."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from tta import config
from tta.benchmark import runs

STREAM = "digits-c"
METHODS = ("source", "norm", "tent", "eata", "sar", "cotta", "rotta", "actmad", "dpcore")


class UsageError(ValueError):
    """The user asked for something that does not exist."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """While a run is being set up, what does not fit is the user's mistake and not a failed run."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error


def parse_request(words: Sequence[str]) -> runs.Request:
    """Sort the words of ``tta run`` into stream, methods and settings, each checked by name and type.

    Raises:
        UsageError: a word that is neither a stream nor a method, or a key that nothing has; the nearest is offered.
    """
    from tta import methods
    from tta.adapter import config_class
    from tta.datasets import catalog

    names = [word for word in words if "=" not in word]
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
    stream = streams[0] if streams else STREAM
    chosen = chosen or list(METHODS)

    keys = {name: [f.name for f in dataclasses.fields(config_class(methods.find(name)))] for name in chosen}  # type: ignore[arg-type]
    of_run = [field.name for field in dataclasses.fields(runs.RunConfig)]
    protocols = [word.partition("=")[2] for word in words if word.partition("=")[0] in ("protocol", "stream.protocol")]
    of_stream = catalog.stream_settings(stream, *protocols[-1:])
    run: dict[str, Any] = {}
    stream_settings: dict[str, Any] = {}
    hparams: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for word in words:
        if "=" not in word:
            continue
        key, _, text = word.partition("=")
        value = config.parse(text)
        owner, dot, name = key.partition(".")
        having = [method for method in chosen if key in keys[method]]
        if dot and owner == "stream":
            known = [*of_stream, "seed", "protocol", "batch_size"]
            if name not in known:
                raise UsageError(f"Stream '{stream}' has no key '{name}'.{config.nearest(name, known)}")
            (stream_settings if name in of_stream else run)[name] = value
        elif dot and owner in keys:
            hparams[owner][name] = value  # a wrong name is answered by the method's own config
        elif dot:
            known = ["stream", *chosen]
            raise UsageError(
                f"'{key}': '{owner}' is not in this run.{config.nearest(owner, known)} There are: {', '.join(known)}."
            )
        elif key in of_run:
            run[key] = value
        elif having:
            for method in having:
                hparams[method][key] = value
        elif key in of_stream:
            stream_settings[key] = value
        else:
            known = sorted({*of_run, *of_stream, *(k for names in keys.values() for k in names)})
            raise UsageError(
                f"No method of this run ({', '.join(chosen)}) has a key '{key}', nor has the run or the stream."
                f"{config.nearest(key, known)}"
            )
    if run.get("reset") is not None:
        run["reset"] = str(run["reset"])
    return runs.Request(stream, chosen, config.build(runs.RunConfig, run), stream_settings, hparams)


def key_values(words: Sequence[str]) -> dict[str, Any]:
    """Settings KEY=VALUE as a mapping; raises a UsageError for a word that is none."""
    strange = next((word for word in words if "=" not in word), None)
    if strange is not None:
        raise UsageError(f"'{strange}' is no setting: expected KEY=VALUE.")
    return {key: config.parse(text) for key, _, text in (word.partition("=") for word in words)}
