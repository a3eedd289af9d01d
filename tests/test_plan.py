"""benchmarks/plan.py: hours of a large benchmark, from what a small run of it measured or from the passes of each method."""

import importlib
from pathlib import Path

import pytest

import tta

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plan():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("plan")


def test_cells_go_to_the_first_worker_that_is_free(plan):
    assert plan.until_the_end([1, 1, 4], 2) == 5
    assert plan.until_the_end([4, 1, 1], 2) == 4
    assert plan.until_the_end([4, 1, 1], 1) == 6


def test_hours_are_images_times_their_cost(plan):
    costs = {"source": plan.Cost(0.5, True), "tent": plan.Cost(2.0, False)}
    text = plan.plan(costs, images=7200, seeds=3, workers=2)
    assert "| `source` | 2 | 1 | 3 | measured |" in text
    assert "| `tent` | 0.5 | 4 | 12 | extrapolated |" in text
    assert "2 methods x 3 seeds x 7200 images: 15 hours of one worker." in text
    assert (
        "With 2 workers the last cell ends after 9 hours, the longest first after 8; less than a cell of `tent`, 4 hours"
        in text
    )
    assert "1.08e+05 images forward" in text


def test_a_pilot_measures_and_the_rest_is_extrapolated_by_passes(plan, tmp_path):
    described = {"methods": ["source", "norm"], "streams": {"digits-c": {"samples": 20, "corruptions": ["fog"]}}}
    tta.bench({**described, "models": ["digits-cnn"], "seeds": [0, 1]}, out=tmp_path)
    costs = plan.from_pilot(tmp_path)
    seconds = [tta.Result.load(file.parent).seconds for file in tmp_path.glob("cells/*norm*/result.json")]
    assert list(costs) == ["norm", "source"]
    assert costs["norm"] == plan.Cost(pytest.approx(sum(seconds) / 40), True)
    with pytest.raises(ValueError, match="holds no results of a benchmark"):
        plan.from_pilot(tmp_path / "empty")
    forwards, backwards = plan.passes("cotta")
    assert forwards > 30
    assert plan.extrapolated("cotta", 1.0, 10.0) == forwards + 10 * backwards


def test_only_methods_that_take_the_model_are_planned(plan):
    names = ["norm", "tent", "foa"]
    assert plan.supported(tta.load_model("digits-cnn"), names) == ["norm", "tent"]
    assert plan.supported(tta.load_model("digits-vit"), names) == ["tent", "foa"]
