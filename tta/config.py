"""Hyper-parameters: defaults <- preset <- overrides, checked by name and type. The only importer of omegaconf."""

import dataclasses
from collections.abc import Mapping
from importlib import resources
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tta.hyperparameters import as_dict as as_dict  # explicit, likewise
from tta.messages import nearest as nearest  # explicit: others call it as config.nearest

C = TypeVar("C")
PLAIN = (bool, int, float, str, bytes, list, tuple, dict, type(None))


class ConfigError(ValueError):
    """Error of a hyper-parameter, preset or setting that does not exist or does not fit its type."""


def build(kind: type[C], *layers: Mapping[str, Any]) -> C:
    """An instance of the dataclass ``kind``: its defaults, overridden by each of the layers in turn.

    Values are converted where that loses nothing (``"1e-3"`` for a float). Objects that a configuration file cannot
    hold (tensors, callables) are taken as they are.

    Raises:
        ConfigError: an unknown name (the nearest one is offered), a value of the wrong type or outside its range, or
            a variable ``${...}``.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in names:
                raise ConfigError(
                    f"Key '{key}' not in '{kind.__name__}'.{nearest(key, names)} "
                    + (f"There are: {', '.join(names)}." if names else "It has no keys.")
                )
            _refuse_variables(kind, key, value)
            given[key] = value
    given = {key: _number(value) for key, value in given.items()}
    plain = {key: value for key, value in given.items() if isinstance(value, PLAIN)}
    objects = {key: value for key, value in given.items() if key not in plain}
    try:
        config = _merge(kind, plain)
    except OmegaConfBaseException as error:
        culprit = next((key for key, value in plain.items() if not _fits(kind, key, value)), None)
        where = f" (key '{culprit}')" if culprit else ""
        raise ConfigError(f"{kind.__name__}: {str(error).splitlines()[0]}{where}") from None
    return dataclasses.replace(config, **objects) if objects else config  # type: ignore[type-var]


def _number(value: Any) -> Any:
    """A NumPy or torch scalar as a Python number; anything else as it is."""
    is_scalar = type(value) not in PLAIN and getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


def _refuse_variables(kind: type[Any], key: str, value: Any) -> None:
    """Refuse ``${...}``: OmegaConf would put in the value of an environment variable, and results would show it."""
    parts = (
        [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    )
    for part in parts:
        _refuse_variables(kind, key, part)
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{kind.__name__}: '{value}' is a variable, which settings do not take: write the value itself (key '{key}')."
        )


def _merge(kind: type[C], values: Mapping[str, Any]) -> C:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))  # type: ignore[return-value]


def _fits(kind: type[Any], key: str, value: Any) -> bool:
    try:
        _merge(kind, {key: value})
    except OmegaConfBaseException:
        return False
    return True


def parse(text: str) -> Any:
    """The value of one command-line override: a number, boolean, list, null, or else the text itself."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load(folder: str, name: str) -> dict[str, Any]:
    """The YAML file ``configs/<folder>/<name>.yaml`` as a dictionary; empty if there is none."""
    file = resources.files("tta.configs") / folder / f"{name}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def names(folder: str) -> list[str]:
    """Names of the YAML files in ``configs/<folder>``, sorted."""
    files = (resources.files("tta.configs") / folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def preset(method: str, name: str) -> dict[str, Any]:
    """The settings of ``configs/method/<method>.yaml`` for one benchmark.

    Raises:
        ConfigError: the method has no such preset; the message lists those it has.
    """
    presets = load("method", method)
    if name not in presets:
        known = f"There are: {', '.join(presets)}." if presets else "It has none."
        raise ConfigError(f"Method '{method}' has no preset '{name}'.{nearest(name, presets)} {known}")
    return dict(presets[name] or {})
