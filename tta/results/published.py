"""Published tables: numbers from papers and benchmarks with their reported settings, in ``configs/published.yaml``."""

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
        about: one-line description.
        source: where the numbers are printed.
        manifest: reported settings of the runs, named as in this toolkit: stream, protocol, reset, batch size, model ...
        domains: the domains of rows that list one error per domain, in their order.
        rows: method -> mean error in percent, or ``{mean:, std:, errors: [...], method:, config: {...}}``: ``errors`` has
            one error per domain; ``method`` and ``config`` name a method of ours and its settings, if the row's name
            differs.
    """

    about: str
    source: str
    manifest: dict[str, Any]
    rows: dict[str, Any]
    domains: list[str] = field(default_factory=list)

    def row(self, method: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The published row for a method with these settings; of several that fit, the one that names most settings."""
        found: list[dict[str, Any]] = []
        for name, entry in self.rows.items():
            row = {"method": name, "config": {}, **(entry if isinstance(entry, Mapping) else {"mean": entry})}
            asked = row["config"].items()
            if row["method"] == method and (not asked if settings is None else asked <= settings.items()):
                found.append(row)
        return max(found, key=lambda row: len(row["config"]), default=None)

    def mean(self, method: str) -> float | None:
        """The published mean error of a method, in percent."""
        row = self.row(method)
        return None if row is None else float(row["mean"])

    def fits(self, place: Mapping[str, Any]) -> bool:
        """Whether stream and protocol are those of the table; a missing value fits any."""
        return all(self.manifest.get(key, place.get(key)) == place.get(key) for key in ("stream", "protocol"))


def available() -> dict[str, str]:
    """Names and one-line descriptions of the published tables."""
    return {name: table["about"] for name, table in config.load(".", "published").items() if name != "domains"}


def find(name: str) -> Published:
    """A published table by name.

    Raises:
        ConfigError: there is no table of that name; the message suggests the nearest.
    """
    tables = config.load(".", "published")
    if name not in available():
        raise config.ConfigError(
            f"No published table '{name}'.{config.nearest(name, available())} There are: {', '.join(available())}."
        )
    return config.build(Published, tables[name])


def differences(result: Result, name: str) -> dict[str, tuple[Any, Any]]:
    """Settings, then errors, in which a result differs from a published row, each with both values.

    Settings that the publication does not report do not differ, nor do errors that are equal to one decimal.

    Args:
        result: of any method in the table.
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
    own = _settings(result)
    found = {key: (own.get(key), value) for key, value in table.manifest.items() if str(own.get(key)) != str(value)}
    errors: dict[str, tuple[float | None, float]] = {"mean_error": (result.mean_error, float(row["mean"]))}
    listed: Sequence[float] = row.get("errors", ())
    for domain, error in zip(table.domains, listed, strict=bool(listed)):
        errors[f"errors.{domain}"] = (result.errors.get(domain), float(error))
    for key, (ours, theirs) in errors.items():
        if ours is None or abs(ours - theirs) >= TOLERANCE:
            found[key] = (ours, theirs)
    return found


def _settings(result: Result) -> dict[str, Any]:
    """The settings of a result under the names that the published tables use."""
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
