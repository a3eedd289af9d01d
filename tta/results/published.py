"""Published tables: what papers and benchmarks report, with what is said of how it came about. In ``configs/published.yaml``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tta import config
from tta.results.result import Result

TOLERANCE = 0.05  # published numbers have one decimal


@dataclass
class Published:
    """One published table.

    Attributes:
        about: what it is.
        source: where it was read.
        manifest: what is said of the runs, in the words of this toolkit: stream, protocol, reset, batch size, model ...
        domains: of the rows that give an error for each, in their order.
        rows: method -> mean error in percent, or ``{mean:, std:, errors: [...], method:, config: {...}}`` where there
            is more to say: another name for a method of ours with these settings, an error a domain.
    """

    about: str
    source: str
    manifest: dict[str, Any]
    rows: dict[str, Any]
    domains: list[str] = field(default_factory=list)

    def row(self, method: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What was published of a method with these settings; the row that names most of them where several fit."""
        found: list[dict[str, Any]] = []
        for name, told in self.rows.items():
            row = {"method": name, "config": {}, **(told if isinstance(told, Mapping) else {"mean": told})}
            asked = row["config"].items()
            if row["method"] == method and (not asked if settings is None else asked <= settings.items()):
                found.append(row)
        return max(found, key=lambda row: len(row["config"]), default=None)

    def mean(self, method: str) -> float | None:
        """The published mean error of a method, in percent."""
        row = self.row(method)
        return None if row is None else float(row["mean"])

    def fits(self, place: Mapping[str, Any]) -> bool:
        """Whether stream and protocol are those of the table, as far as both are said."""
        return all(self.manifest.get(key, place.get(key)) == place.get(key) for key in ("stream", "protocol"))


def available() -> dict[str, str]:
    """Names of the published tables, each with what it is in a line."""
    return {name: told["about"] for name, told in config.load(".", "published").items() if name != "domains"}


def find(name: str) -> Published:
    """A published table by name.

    Raises:
        ConfigError: there is none of that name; the nearest is offered.
    """
    tables = config.load(".", "published")
    if name not in available():
        raise config.ConfigError(
            f"No published table '{name}'.{config.nearest(name, available())} There are: {', '.join(available())}."
        )
    return config.build(Published, tables[name])


def differences(result: Result, name: str) -> dict[str, tuple[Any, Any]]:
    """Where a result differs from a published row: what is said of both, then the errors, each with both values.

    What the publication does not say cannot differ. Errors that are equal to one decimal do not.

    Args:
        result: of any method of the table.
        name: of the table.

    Raises:
        ConfigError: no such table, or the method is not in it.
    """
    table = find(name)
    row = table.row(result.method, result.config)
    if row is None:
        raise config.ConfigError(
            f"Published table '{name}' has no row for '{result.method}'. There are: {', '.join(table.rows)}."
        )
    said = _described(result)
    found = {key: (said.get(key), value) for key, value in table.manifest.items() if str(said.get(key)) != str(value)}
    errors: dict[str, tuple[float | None, float]] = {"mean_error": (result.mean_error, float(row["mean"]))}
    listed: Sequence[float] = row.get("errors", ())
    for domain, error in zip(table.domains, listed, strict=bool(listed)):
        errors[f"errors.{domain}"] = (result.errors.get(domain), float(error))
    off = {key: (own, told) for key, (own, told) in errors.items() if own is None or abs(own - told) >= TOLERANCE}
    return {**found, **off}


def _described(result: Result) -> dict[str, Any]:
    """What a result says of how it came about, in the words that the published tables use."""
    data = result.manifest.get("data", {})
    return {
        **data.get("settings", {}),
        "stream": result.stream,
        "protocol": data.get("protocol"),
        "reset": result.reset,
        "batch_size": data.get("batch_size"),
        "model": result.manifest.get("model", {}).get("spec"),
        "samples": max((row.samples for row in result.rows), default=0),
    }
