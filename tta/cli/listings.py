"""Listings for ``tta list``: pairs of a name and its description."""

from typing import Any

from tta import config


def _methods() -> list[tuple[str, str]]:
    from tta import methods

    table = config.load(".", "methods")
    known = {name: _lines_of(facts) for name, facts in table.items()}
    return [
        (name, known[name] if name in known else (methods.find(name).__doc__ or "").strip().splitlines()[0])
        for name in methods.available()
    ]


def _lines_of(facts: dict[str, Any]) -> str:
    """The facts that ``benchmarks/methods_table.py`` recorded about a method."""
    needs = [f"source: {facts['source']}", f"batch: {facts['batch']}", f"models: {', '.join(facts['models'])}"]
    passes = f"{facts['forwards']:g} forward, {facts['backwards']:g} backward an image"
    parity = "golden parity" if facts["golden"] else "no golden key"
    released = [f"as released: {', '.join(facts['released'])}"] if facts["released"] else []
    return "\n".join([facts["about"], *facts["papers"], " · ".join([*needs, passes, parity]), *released])


def _streams() -> list[tuple[str, str]]:
    from tta.datasets import catalog

    return [(name, line) for name, (_, line) in catalog.STREAMS.items()]


def _models() -> list[tuple[str, str]]:
    from tta import models

    return list(models.list_models().items())


def _corruptions() -> list[tuple[str, str]]:
    from tta.datasets.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS

    return [(name, "") for name in CORRUPTIONS] + [(name, "to tune on") for name in VALIDATION_CORRUPTIONS]


def _protocols() -> list[tuple[str, str]]:
    from tta.datasets.protocols import PROTOCOLS

    return [(name, protocol.line) for name, protocol in PROTOCOLS.items()]


def _benchmarks() -> list[tuple[str, str]]:
    from tta import benchmark

    return list(benchmark.available().items())


def _published() -> list[tuple[str, str]]:
    from tta.results import published

    return list(published.available().items())


LISTINGS = {
    "methods": _methods,
    "streams": _streams,
    "models": _models,
    "corruptions": _corruptions,
    "protocols": _protocols,
    "benchmarks": _benchmarks,
    "published": _published,
}
NOTES = {
    "methods": "guard=true puts a guard around any of them: never worse than the source model for long. "
    "Without a method, tta run takes auto, guarded. One around another: chain:tent, gala:tent. "
    "Several workers can share one stream (torchrun) with actmad, auto, eata, norm, sar, source, tent."
}
