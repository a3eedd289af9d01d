"""A run batch by batch, its Parquet file, and what shows a collapse."""

import math

import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import TensorDataset

import tta
from tta.results import Predictions, Result, Row, curves


def predictions(prediction, lengths, label=None, **changes):
    n = len(prediction)
    label = np.zeros(n, int) if label is None else label
    batch = np.repeat(np.arange(len(lengths)), lengths)
    columns = {"domain": np.zeros(n, int), "index": np.arange(n), "label": label, "prediction": prediction}
    more = {"batch": batch, "seconds": batch * 0.5, "confidence": np.linspace(0, 1, n), "entropy": np.linspace(1, 2, n)}
    return Predictions(**{name: np.asarray(values) for name, values in {**columns, **more, **changes}.items()})


def test_each_batch_is_a_row():
    found = curves.per_batch(predictions([0, 1, 1, 0, 2], [2, 3], label=[0, 0, -1, -1, -1]), ["fog"])
    assert found["batch"].tolist() == [0, 1]
    assert found["domain"] == ["fog", "fog"]
    assert found["samples"].tolist() == [2, 3]
    assert found["error"][0] == 50
    assert math.isnan(found["error"][1])  # no known class
    np.testing.assert_allclose(found["confidence"], [0.125, 0.75])
    np.testing.assert_allclose(found["entropy"], [1.125, 1.75])
    assert found["classes"] == [{0: 1, 1: 1}, {0: 1, 1: 1, 2: 1}]
    assert found["seconds"].tolist() == [0, 0.5]


def test_class_entropy_is_that_of_the_batch_or_of_the_last_hundred_samples():
    prediction = np.random.default_rng(0).integers(0, 5, 460)
    found = curves.per_batch(predictions(prediction, [250] + 210 * [1]), ["fog"])

    def plain(values):
        shares = [np.mean(values == value) for value in set(values.tolist())]
        return -sum(share * math.log(share) for share in shares)

    assert found["class_entropy"][0] == pytest.approx(plain(prediction[:250]))
    assert found["class_entropy"][1] == pytest.approx(plain(prediction[151:251]))
    assert found["class_entropy"][-1] == pytest.approx(plain(prediction[360:]))
    assert found["largest_share"][-1] == max(np.bincount(prediction[360:])) / 100
    first = curves.per_batch(predictions(prediction[:3], [1, 1, 1]), ["fog"])
    assert first["class_entropy"][2] == pytest.approx(plain(prediction[:3]))  # there are no hundred yet


def test_a_collapse_shows():
    random = np.random.default_rng(0)
    label = random.integers(0, 10, 4000)
    prediction = np.where(np.arange(4000) < 2000, label, 7)
    found = curves.collapse(curves.per_batch(predictions(prediction, 20 * [200], label=label), ["fog"]))
    assert found["class_entropy"]["first"] > 2.2
    assert found["class_entropy"]["last"] == 0
    assert found["label_entropy"]["last"] > 2.2
    assert found["largest_share"]["last"] == 1
    assert found["worst"]["batch"] >= 10
    assert found["worst"]["class_entropy"] == 0


def test_a_one_sided_stream_is_no_collapse():
    label = np.repeat([0, 1, 2, 3], 100)
    label[150] = 3  # one batch holds two classes, of which the model predicts one
    prediction = np.repeat([0, 1, 2, 3], 100)
    found = curves.collapse(curves.per_batch(predictions(prediction, 4 * [100], label=label), ["fog"]))
    assert found["worst"]["batch"] == 1
    unknown = curves.per_batch(predictions(prediction, 4 * [100], label=np.full(400, -1)), ["fog"])
    assert math.isnan(unknown["label_entropy"][0])
    assert curves.collapse(unknown)["worst"]["class_entropy"] == 0


def test_older_predictions_have_no_curves():
    old = Predictions(domain=[0], index=[0], label=[0], prediction=[1])
    with pytest.raises(ValueError, match="kept without 'batch'"):
        curves.per_batch(old, ["fog"])


@pytest.fixture(scope="module")
def result():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(90, 3, 32, 32, generator=generator), torch.randint(0, 10, (90,), generator=generator)
    data = {"a": TensorDataset(images[:50], labels[:50]), "b": TensorDataset(images[50:], labels[50:])}
    stream = tta.stream(data, batch_size=20)
    return tta.evaluate(tta.adapt(tta.load_model("digits-cnn"), "norm"), stream, progress=False)


def test_curves_of_a_run(result):
    table = result.curves
    assert table["domain"].tolist() == ["a", "a", "a", "b", "b"]
    assert table["samples"].tolist() == [20, 20, 10, 20, 20]
    assert table["seconds"].is_monotonic_increasing
    assert 0 < table["seconds"].iloc[-1] <= result.seconds
    weighted = (table["error"] * table["samples"]).sum() / 90
    assert weighted == pytest.approx(result.metrics["sample_weighted_error"])


def test_parquet_holds_the_curves_and_loading_gives_them_back(result, tmp_path):
    result.save(tmp_path)
    table = pandas.read_parquet(tmp_path / "curves.parquet")
    mine = result.curves
    assert list(table.columns) == list(mine.columns)
    assert [dict(pairs) for pairs in table["classes"]] == mine["classes"].tolist()
    pandas.testing.assert_frame_equal(table.drop(columns="classes"), mine.drop(columns="classes"), check_dtype=False)
    loaded = Result.load(tmp_path)
    assert loaded.predictions == result.predictions
    pandas.testing.assert_frame_equal(loaded.curves, mine)
    assert loaded.metrics == result.metrics


def test_a_result_of_an_earlier_version_loads(result, tmp_path):
    old = {name: getattr(result.predictions, name) for name in ("domain", "index", "label", "prediction")}
    fields = {
        "method": "norm",
        "stream": "toy",
        "seed": 0,
        "reset": "never",
        "config": {},
        "manifest": {},
        "seconds": 1.0,
    }
    Result(rows=result.rows, predictions=Predictions(**old), **fields).save(tmp_path)
    text = (tmp_path / "result.json").read_text()
    assert '"metrics": {}' in text
    (tmp_path / "result.json").write_text(text.replace('  "metrics": {},\n', ""))
    loaded = Result.load(tmp_path)
    assert loaded.metrics == {}
    assert loaded.errors == result.errors
    assert {file.name for file in tmp_path.iterdir()} == {"result.json", "predictions.npz"}
    with pytest.raises(ValueError, match="kept without 'batch'"):
        loaded.curves  # noqa: B018


def test_saving_over_a_result_leaves_nothing_of_it(result, tmp_path):
    result.save(tmp_path)
    row = Row(domain="a", samples=1, errors=0)
    Result(method="x", stream="y", seed=0, reset="never", rows=(row,), config={}, manifest={}, seconds=1.0).save(
        tmp_path
    )
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(ValueError, match=r"keep predictions\.npz"):
        Result.load(tmp_path).curves  # noqa: B018
