"""Configurations: defaults <- preset <- overrides, by name and type."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import tta
from tta import config
from tta.adapter import OptimizerConfig, config_class
from tta.methods import find


@dataclass
class Toy(OptimizerConfig):
    prompts: torch.Tensor | None = None


def test_later_layers_win():
    built = config.build(OptimizerConfig, {"lr": 0.1, "momentum": 0.5}, {"lr": "2e-1"})
    assert (built.lr, built.momentum, built.steps) == (0.2, 0.5, 1)
    assert built.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("3", 3), ("true", True), ("null", None), ("[a, 1]", ["a", 1]), ("fog", "fog")]
)
def test_command_line_values(text, value):
    assert config.parse(text) == value


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"momentun": 0.1}, "Key 'momentun' not in 'OptimizerConfig'. Did you mean 'momentum'"),
        ({"steps": "two"}, "could not be converted to Integer"),
        ({"optimizer": "lion"}, "lion"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"betas": [0.9]}, "betas"),
    ],
)
def test_what_does_not_fit_is_named(layer, message):
    with pytest.raises(ValueError, match=message):
        config.build(OptimizerConfig, layer)


@pytest.mark.parametrize("method", config.names("method"))
def test_every_preset_fits_its_method(method):
    assert method in tta.list_methods()
    for name in config.load("method", method):
        config.build(config_class(find(method)), config.preset(method, name))


def test_plain_form_of_a_configuration_is_json():
    assert config.as_dict(OptimizerConfig())["betas"] == [0.9, 0.999]


@dataclass
class Settings:
    name: str = ""
    rate: float = 0.1
    rest: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "${oc.env:TTA_SECRET}"},
        {"name": "/data/${oc.env:TTA_SECRET}/x"},
        {"rate": "${oc.decode:${oc.env:TTA_SECRET}}"},
        {"name": "${rate}"},
        {"rest": {"root": ["${oc.env:TTA_SECRET}"]}},
        {"rest": {"${oc.env:TTA_SECRET}": 1}},
    ],
)
def test_variables_are_not_put_in(given, monkeypatch):
    monkeypatch.setenv("TTA_SECRET", "0.5")
    with pytest.raises(config.ConfigError, match="write the value itself") as error:
        config.build(Settings, given)
    assert "0.5" not in str(error.value)
    assert config.build(Settings, {"name": "$5 {x} $HOME"}).name == "$5 {x} $HOME"
