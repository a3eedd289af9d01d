"""Published tables: whole, and compared with results."""

import pytest
import torch

from tta import config, methods, models
from tta.cli import main
from tta.config import ConfigError
from tta.datasets.catalog import PROTOCOLS
from tta.results import Result, Row, published

TENT = published.find("tent-cifar10-c")


def make(method="tent", errors=None, **changes):
    errors = errors or TENT.rows[method]["errors"]
    rows = tuple(Row(domain=d, samples=10000, errors=round(100 * e)) for d, e in zip(TENT.domains, errors, strict=True))
    data = {"protocol": "per-domain", "batch_size": 200, "settings": {"severity": 5}}
    fields = {"stream": "cifar10-c", "seed": 0, "reset": "domain", "config": {}, "seconds": 1.0}
    manifest = {"data": data, "model": {"spec": TENT.manifest["model"]}}
    return Result(**{"method": method, "rows": rows, "manifest": manifest, **fields, **changes})


@pytest.mark.parametrize("name", published.available())
def test_every_table_is_whole(name):
    table = published.find(name)
    assert table.about
    assert table.source
    assert table.manifest["protocol"] in PROTOCOLS
    assert {"stream", "model"} <= set(table.manifest)
    for name, given in table.rows.items():
        row = (
            table.row(given.get("method", name), given.get("config", {}))
            if isinstance(given, dict)
            else table.row(name)
        )
        assert 0 < row["mean"] < 100
        if "errors" in row:
            assert len(row["errors"]) == len(table.domains)
            # The rows are rounded to a decimal each, and so is the mean.
            assert abs(sum(row["errors"]) / len(row["errors"]) - row["mean"]) < 0.1


def test_models_that_have_a_spec_are_named_by_it():
    named = {published.find(name).manifest["model"] for name in published.available()}
    specs = {name for name in named if ":" in name or name in models.list_models()}
    assert {"robustbench:cifar10/Standard", "torchvision:resnet50/IMAGENET1K_V1"} <= specs
    with torch.device("meta"):
        found = {models.load_model(spec, pretrained=False).spec for spec in specs}
    assert found == specs


def test_a_result_like_the_published_one_agrees():
    assert published.differences(make(), "tent-cifar10-c") == {}


def test_what_differs_is_named_with_both_values():
    errors = [25.8, *TENT.rows["tent"]["errors"][1:]]
    found = published.differences(make(errors=errors, reset="never"), "tent-cifar10-c")
    assert found["reset"] == ("never", "domain")
    assert found["errors.gaussian_noise"] == (25.8, 24.8)
    assert set(found) == {"reset", "errors.gaussian_noise", "mean_error"}


def test_the_row_is_the_one_of_the_settings():
    table = published.find("eata-imagenet-c")
    assert table.row("eata", {"fisher_alpha": 0.0})["mean"] == 51.9
    assert table.row("eata", {"fisher_alpha": 2000.0})["mean"] == 52.2
    assert table.mean("eata") == 52.2
    assert table.mean("norm") is None


def test_unknown_tables_and_methods_are_answered():
    with pytest.raises(ConfigError, match=r"No published table 'tent-cifar-c'. Did you mean 'tent-cifar10-c'"):
        published.find("tent-cifar-c")
    with pytest.raises(ConfigError, match=r"has no row for 'sar'. There are: source, norm, tent"):
        published.differences(make("sar", TENT.rows["tent"]["errors"]), "tent-cifar10-c")


def test_published_methods_of_ours_go_by_our_names():
    named = {name for table in published.available() for name in published.find(table).rows}
    assert {"source", "norm", "tent", "eata", "sar", "cotta", "rotta", "dpcore"} <= named & set(methods.available())


def test_diff_works_against_a_published_row(tmp_path, capsys):
    make(reset="never").save(tmp_path / "run")
    assert main(["diff", str(tmp_path / "run"), "published:tent-cifar10-c"]) == 0
    assert "reset" in capsys.readouterr().out
    make().save(tmp_path / "same")
    assert main(["diff", str(tmp_path / "same"), "published:tent-cifar10-c"]) == 0
    assert "agree in every field" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "same"), "published:tent"]) == 2
    assert "No published table 'tent'" in capsys.readouterr().err
    assert main(["list", "published"]) == 0
    assert "online-tta-cifar10-c" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "preset", "key", "value"),
    [
        # mariodoebler/test-time-adaptation, conf.py: one threshold for every data set
        ("sar", "cifar10-c", "reset_constant", 0.2),
        ("sar", "cifar100-c", "reset_constant", 0.2),
        # Gorilla-Lab-SCUT/TTAC, cifar/scripts/run_ttac_cifar100_no_without_queue.sh
        ("ttac", "cifar100-c", "lr", 1e-3),
    ],
)
def test_presets_hold_the_released_scripts_values(method, preset, key, value):
    assert config.preset(method, preset)[key] == value
