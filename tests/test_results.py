"""Results: counts and their means, JSON both ways, and the paired bootstrap."""

import json
import math
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tta
from tta.results import (
    BrokenResultWarning,
    Predictions,
    Result,
    Row,
    compare_errors,
    differences,
    environment,
    error_interval,
    find_results,
)


def predictions(domain, index, label, prediction):
    arrays = {"domain": domain, "index": index, "label": label, "prediction": prediction}
    return Predictions(**{name: np.asarray(values) for name, values in arrays.items()})


def make(rows=(("fog", 4, 1), ("snow", 2, 1)), **changes):
    fields = {
        "method": "tent",
        "stream": "toy",
        "seed": 0,
        "reset": "never",
        "rows": tuple(Row(domain=name, samples=n, errors=e) for name, n, e in rows),
        "config": {"lr": 1e-3, "betas": (0.9, 0.999)},
        "manifest": {"model": {"spec": "toy"}, "odd": float("nan")},
        "seconds": 1.5,
    }
    return Result(**{**fields, **changes})


def run_of(wrong, **changes):
    """A result of one method on images 0 .. n-1 in two domains; ``wrong`` (2, n): whether each was misclassified."""
    wrong = np.asarray(wrong, dtype=int)
    domain, index = np.indices(wrong.shape)
    found = predictions(domain.ravel(), index.ravel(), np.zeros(wrong.size, int), wrong.ravel())
    rows = [(name, wrong.shape[1], int(part.sum())) for name, part in zip(("fog", "snow"), wrong, strict=True)]
    return make(rows, predictions=found, **changes)


def test_mean_error_is_the_mean_over_domains_not_over_samples():
    result = make()
    assert result.errors == {"fog": 25.0, "snow": 50.0}
    assert result.mean_error == 37.5  # 2 errors in 6 samples would be 33.3
    assert result.samples == 6


def test_a_domain_without_scored_samples_does_not_count():
    result = make([("fog", 4, 1), ("odd", 0, 0)])
    assert result.mean_error == 25.0
    assert math.isnan(result.errors["odd"])
    assert json.loads(result.to_json())["errors"] == {"fog": 25.0, "odd": None}


@pytest.mark.parametrize("with_predictions", [False, True])
def test_saving_and_loading_give_the_same_result(tmp_path, with_predictions):
    result = run_of([[0, 1, 0], [1, 1, 0]]) if with_predictions else make()
    assert result.save(tmp_path / "a") == tmp_path / "a" / "result.json"
    loaded = Result.load(tmp_path / "a")
    assert loaded == result
    assert loaded.predictions == result.predictions
    assert {file.name for file in (tmp_path / "a").iterdir()} <= {"result.json", "predictions.npz"}


def test_json_holds_the_keys_that_other_programs_read():
    found = json.loads(make().to_json())
    names = "method stream seed reset errors mean_error config manifest samples seconds"
    assert set(names.split()) <= found.keys()
    assert found["config"] == {"lr": 1e-3, "betas": [0.9, 0.999]}
    assert found["manifest"]["odd"] is None


def test_find_results_goes_through_folders(tmp_path):
    make().save(tmp_path / "b" / "x")
    make(seed=1).save(tmp_path / "a")
    assert [result.seed for result in find_results(tmp_path)] == [1, 0]
    assert len(find_results([tmp_path, tmp_path / "a"])) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "invalid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"schema": 99}', "schema 99, this version of tta-toolkit reads up to 1"),
        ('{"schema": 1, "method": "x"}', "missing key 'stream'"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, text, message):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        find_results(tmp_path)
    assert str(tmp_path) in str(error.value)


GOOD = json.loads(make([("fog", 1, 1)]).to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"method": ["x"]},
        {"stream": None},
        {"seed": "0"},
        {"seed": True},
        {"reset": {}},
        {"config": None},
        {"config": []},
        {"manifest": "m"},
        {"metrics": [1]},
        {"seconds": "1"},
        {"skipped_updates": 0.5},
        {"rows": 5},
        {"rows": {"domain": "fog"}},
        {"rows": [{"domain": ["fog"], "samples": 1, "errors": 1}]},
        {"rows": [{"domain": "fog", "samples": "1", "errors": 1}]},
        {"rows": [None]},
    ],
    ids=str,
)
def test_values_of_other_types_are_named_with_the_file(tmp_path, change):
    (tmp_path / "result.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "result.json")) + ".*Not a result"):
        find_results(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b""], ids=["bytes", "deep", "empty"])
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "result.json"))):
        find_results(tmp_path)


def broken_predictions(kind, file):
    whole = file.read_bytes()
    if kind == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "flipped":
        file.write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    elif kind == "compression":
        at = whole.index(b"PK\x01\x02")  # the list of files at the end, which names a method that does not exist
        file.write_bytes(whole[: at + 10] + b"\x63" + whole[at + 11 :])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("no arrays")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"domain": 1}))
    elif kind == "objects":
        np.savez(file, domain=np.array([{}], dtype=object))
    elif kind == "strange":
        np.savez(file, domain=np.zeros(1, int), nonsense=np.zeros(1))
    elif kind == "matrix":
        columns = dict.fromkeys(("domain", "index", "label", "prediction"), np.zeros(1, int))
        np.savez(file, **columns, entropy=np.zeros((1, 2)))


KINDS = ["cut", "flipped", "empty", "text", "pickle", "objects", "strange", "matrix", "compression"]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_predictions_are_named_with_the_file(tmp_path, kind):
    make([("fog", 1, 0)], predictions=predictions([0], [0], [0], [0])).save(tmp_path)
    broken_predictions(kind, tmp_path / "predictions.npz")
    with pytest.raises(
        ValueError, match=re.escape(str(tmp_path / "predictions.npz")) + ".*not the predictions of a result"
    ):
        Result.load(tmp_path)


def test_broken_results_are_left_out_where_that_is_asked_for(tmp_path):
    make([("fog", 1, 1)]).save(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    with pytest.warns(BrokenResultWarning, match=re.escape(str(tmp_path / "bad" / "result.json"))):
        assert find_results(tmp_path, on_error="skip") == [make([("fog", 1, 1)])]
    with pytest.raises(ValueError, match="invalid JSON"):
        find_results(tmp_path / "bad", on_error="skip")  # none is left
    with pytest.raises(ValueError, match="on_error is 'raise' or 'skip'; got 'no'"):
        find_results(tmp_path, on_error="no")


def test_what_is_being_written_is_no_result_yet(tmp_path):
    make([("fog", 1, 1)]).save(tmp_path / "good")
    make([("fog", 1, 0)]).save(tmp_path / ".good.host.1.0a")
    assert len(find_results(tmp_path)) == 1


def test_an_absent_result_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no result\.json"):
        find_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (("a", 2, 3),)}, "expected 0 <= errors <= samples"),
        ({"rows": (("a", 2, 1), ("a", 2, 1))}, "repeated: a"),
        ({"seconds": float("nan")}, "seconds is a finite time"),
    ],
)
def test_impossible_results_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_predictions_of_another_run_are_refused():
    with pytest.raises(ValueError, match="They come from different runs"):
        make([("fog", 1, 1)], predictions=predictions([0], [0], [3], [3]))


def test_differences_name_the_fields_and_ignore_the_clock():
    first = make(manifest={"device": "cpu", "model": {"weights": "ab"}}, seconds=1.0)
    second = make(
        [("fog", 4, 2), ("snow", 2, 1)],
        manifest={"device": "cpu", "model": {"weights": "ac"}},
        config={"lr": 0.1},
        seed=2,
    )
    assert differences(first, make(manifest=first.manifest, seconds=9.0)) == {}
    assert differences(first, second) == {
        "seed": (0, 2),
        "config.lr": (1e-3, 0.1),
        "config.betas.0": (0.9, None),
        "config.betas.1": (0.999, None),
        "manifest.model.weights": ("ab", "ac"),
        "mean_error": (37.5, 50.0),
        "errors.fog": (25.0, 50.0),
    }


def test_interval_of_equal_methods_is_zero_and_of_a_constant_gap_has_no_width():
    wrong = np.random.default_rng(0).integers(0, 2, (2, 50))
    same = compare_errors(run_of(wrong), run_of(wrong))
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    gap = compare_errors(run_of(np.zeros((2, 50))), run_of(np.ones((2, 50))))
    assert (gap.estimate, gap.low, gap.high) == (100, 100, 100)


def test_bootstrap_agrees_with_a_plain_loop_over_resampled_images():
    random = np.random.default_rng(1)
    first, second = random.integers(0, 2, (2, 2, 40))
    interval = compare_errors(run_of(first), run_of(second), resamples=2000)
    difference = (second - first).mean(0)  # both domains of an image move together
    means = [100 * random.choice(difference, 40).mean() for _ in range(4000)]
    assert interval.estimate == pytest.approx(100 * difference.mean())
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=2.0)
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=2.0)


def test_pairs_are_matched_by_domain_name_and_image_in_any_order():
    first = run_of([[0, 1, 0, 1], [1, 1, 0, 0]])
    order = np.random.default_rng(0).permutation(8)
    shuffled = make(
        [(row.domain, row.samples, row.errors) for row in first.rows], predictions=first.predictions.select(order)
    )
    interval = compare_errors(first, shuffled)
    assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)


def test_comparing_different_data_is_refused():
    first = run_of([[0, 1], [1, 0]])
    other = make([("fog", 2, 0)], predictions=predictions([0, 0], [0, 1], [5, 5], [5, 5]))
    with pytest.raises(ValueError, match="of different data"):
        compare_errors(first, other)
    with pytest.raises(ValueError, match="no image in common"):
        compare_errors(first, make([("fog", 1, 0)], predictions=predictions([0], [77], [0], [0])))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(2, 30))
def test_interval_holds_the_estimate(seed, n):
    result = run_of(np.random.default_rng(seed).integers(0, 2, (2, n)))
    interval = error_interval(result, resamples=200)
    assert interval.estimate == pytest.approx(result.mean_error)
    assert 0 <= interval.low <= interval.estimate + 1e-9
    assert interval.estimate <= interval.high + 1e-9 <= 100 + 1e-6


def test_environment_names_versions():
    found = environment()
    assert found["torch"]
    assert found["tta-toolkit"]
    assert "platform" in found


def test_the_environment_names_the_commit_of_a_checkout():
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or Path(tta.__file__).parent.parent != root:
        pytest.skip("the package in use does not lie in a git checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert environment()["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_a_name_is_printed_as_it_is():
    result = make(method="a\x1b[2J\nb")
    assert str(result).startswith(r"a\x1b[2J\nb on toy")
    assert "\x1b" not in repr(result)
