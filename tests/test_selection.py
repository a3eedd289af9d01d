"""Ways of selecting hyper-parameters, the oracle of single steps, and what of them a table says."""

import numpy as np
import pytest
import torch

import tta
from tta import benchmark
from tta.benchmark import selection, summary
from tta.cli import main
from tta.config import ConfigError
from tta.datasets.corruptions import VALIDATION_CORRUPTIONS
from tta.engine import Consistency
from tta.results import Predictions, Result, Row

DESCRIBED = {
    "methods": ["source", "tent"],
    "streams": ["digits-c"],
    "models": ["digits-cnn"],
    "seeds": [0, 1],
    "grid": {"lr": [0.1, 0.01, 0.001]},
    "select": list(selection.WAYS),
}
SAMPLES = 10
# lr -> wrong predictions on the test stream, on the validation stream, entropy, consistency: each prefers another one
TENT = {0.1: (9, 2, 0.9, 50.0), 0.01: (3, 5, 0.5, 40.0), 0.001: (5, 4, 0.7, 90.0)}
CHOSEN = {"online-last": 0.01, "validation": 0.1, "entropy": 0.01, "consistency": 0.001}


def entries(**changes):
    return benchmark.entries(benchmark.load({**DESCRIBED, **changes}))


def outcome(cell):
    wrong, elsewhere, entropy, consistency = TENT.get(cell.hparams.get("lr"), (8, 8, 1.0, 10.0))
    wrong = elsewhere if "corruptions" in cell.stream_settings else wrong
    label = np.zeros(SAMPLES, int)
    predicted = Predictions(
        domain=label,
        index=np.arange(SAMPLES),
        label=label,
        prediction=(np.arange(SAMPLES) < wrong).astype(int),
        entropy=np.full(SAMPLES, entropy),
    )
    return Result(
        method=cell.method, stream=cell.stream, seed=cell.seed, reset="never", config=dict(cell.hparams), manifest={},
        rows=(Row(domain="fog", samples=SAMPLES, errors=wrong),), seconds=1.0, predictions=predicted,
        metrics={"consistency": consistency},
    )  # fmt: skip


def outcomes(rows):
    return {cell.name: outcome(cell) for cell in benchmark.in_order(rows)}


@pytest.mark.parametrize(("way", "lr"), CHOSEN.items())
def test_each_way_selects_by_what_it_may_know(way, lr):
    rows = entries(select=[way])
    (row,) = (row for row in rows if row.method == "tent")
    assert selection.select(row, outcomes(rows)).settings == {"lr": lr}


def test_a_candidate_that_failed_is_not_selected():
    rows = entries(select=["entropy"])
    (row,) = (row for row in rows if row.method == "tent")
    found = outcomes(rows)
    del found[row.candidates[1].cells[1].name]  # one seed of the best
    assert selection.select(row, found).settings == {"lr": 0.001}


def test_labels_of_the_test_images_make_an_oracle_and_the_table_says_so():
    rows = entries()
    found = summary.summarise(rows, outcomes(rows))
    for section in found.sections:
        source, tent = section.lines
        assert not source.is_oracle  # there was nothing to select
        assert tent.is_oracle == (section.way in ("episodic-oracle", "online-last"))
        assert ("oracle: " in section.title) == tent.is_oracle
    assert [line.settings for section in found.sections for line in section.lines if line.method == "tent"][1:] == [
        {"lr": lr} for lr in CHOSEN.values()
    ]
    for kind in ("terminal", "markdown", "latex", "html"):
        assert "tent (oracle)" in " ".join(found.format(kind).split())
    table = found.to_frame()
    assert dict(zip(table["selection"], table["labels"], strict=True)) == {
        "episodic-oracle": "oracle",
        "online-last": "oracle",
        "validation": "validation",
        "entropy": "none",
        "consistency": "none",
    }


def test_only_validation_runs_on_other_corruptions_and_cells_are_shared():
    rows = entries()
    by_way = {row.way: row for row in rows if row.method == "tent"}
    tuned = by_way["validation"].candidates[0]
    assert tuned.tuning[0].stream_settings["corruptions"] == list(VALIDATION_CORRUPTIONS)
    assert "corruptions" not in tuned.cells[0].stream_settings
    assert all(c.cells == c.tuning for way in ("online-last", "entropy") for c in by_way[way].candidates)
    assert by_way["online-last"].candidates == by_way["entropy"].candidates
    episodic = by_way["episodic-oracle"].cells[0]
    assert (episodic.protocol, episodic.oracle_steps, episodic.hparams["steps"]) == ("episodic", 10, 1)
    # online: 3 rates on both streams, source on the test stream; episodic: 3 rates and source; each with two seeds
    assert len(benchmark.in_order(rows)) == 2 * (3 + 3 + 1 + 3 + 1)


def test_the_grids_of_the_paper_are_searched_where_none_is_given():
    rows = entries(grid={}, select=["episodic-oracle", "online-last"])
    points = {row.way: [dict(c.settings) for c in row.candidates] for row in rows if row.method == "tent"}
    assert points["episodic-oracle"] == [{"lr": lr} for lr in (1e-3, 5e-4, 1e-4)]
    assert len(points["online-last"]) == 9
    assert {"lr": 5e-3, "steps": 3} in points["online-last"]


def test_a_stream_without_spare_corruptions_cannot_be_tuned_on_them():
    with pytest.raises(ConfigError, match="'validation' cannot tune on the four spare ones"):
        entries(streams=["imagenet-r"], models=["timm:resnet50"], select=["validation"])


@pytest.fixture(scope="module")
def stream():
    return tta.stream("digits-c", corruptions=["fog", "contrast"], samples=40, batch_size=20)


def adapter(**settings):
    return tta.adapt(tta.load_model("digits-cnn"), "tent", lr=0.02, **settings)


def test_the_oracle_takes_the_best_of_single_steps(stream):
    """Against the plainest loop, by hand: step, predict, look at the labels, go on from the best state."""
    found = tta.evaluate(adapter(), stream, oracle_steps=3, progress=False)
    one = adapter()
    predictions = []
    for batch in stream:
        tried = []
        for _ in range(3):
            one(batch.images)
            logits = one.predict(batch.images).detach()
            right = int((logits.argmax(1) == batch.labels).sum())
            loss = float(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
            tried.append((-right, loss, len(tried), logits, one.state_dict()))
        _, _, _, logits, state = min(tried, key=lambda trial: trial[:3])
        one.load_state_dict(state)
        predictions.append(logits.argmax(1))
    assert torch.equal(torch.from_numpy(found.predictions.prediction), torch.cat(predictions))
    assert found.manifest["oracle_steps"] == 3


def test_with_one_step_there_is_nothing_for_the_oracle_to_choose(stream):
    labels = found = None
    for shuffled in (False, True):
        one = tta.stream("digits-c", corruptions=["fog"], samples=40, batch_size=20)
        if shuffled:
            one.domains[0].labels = one.domains[0].labels.flip(0)
        result = tta.evaluate(adapter(), one, oracle_steps=1, progress=False)
        if shuffled:
            assert not np.array_equal(result.predictions.label, labels)
            assert np.array_equal(result.predictions.prediction, found)
        labels, found = result.predictions.label, result.predictions.prediction


def test_more_steps_to_choose_from_make_no_more_errors_when_episodic(stream):
    errors = [tta.evaluate(adapter(), stream, reset="batch", oracle_steps=n, progress=False).mean_error for n in (1, 4)]
    assert errors[1] <= errors[0]


def test_consistency_is_measured_without_changing_the_run(stream):
    plain = tta.evaluate(adapter(), stream, progress=False)
    watch = Consistency()
    watched = tta.evaluate(adapter(), stream, callbacks=[watch], progress=False)
    assert np.array_equal(watched.predictions.nll, plain.predictions.nll)
    for name in ("forwards", "backwards"):
        assert watched.metrics[name] == plain.metrics[name]
    one, alike = adapter(), []
    for batch in stream:
        one(batch.images)
        moved = batch.images.clone()
        moved[:, :, 2:, 2:] = batch.images[:, :, :-2, :-2]
        moved[:, :, :2, 2:] = batch.images[:, :, [2, 1]][..., :-2]
        moved[:, :, :, :2] = moved[:, :, :, [4, 3]]
        alike.append(one.predict(batch.images).argmax(1) == one.predict(moved).argmax(1))
    assert watch.percent == pytest.approx(100 * torch.cat(alike).float().mean().item())
    assert 0 < watch.percent < 100


def test_tune_from_the_command_line(tmp_path, capsys):
    words = [
        "digits-c",
        "source",
        "tent",
        "grid.lr=[0.1,0.001]",
        "stream.samples=10",
        "oracle_steps=2",
        "batch_size=10",
    ]
    narrow = ["stream.corruptions=[fog]", "models=[digits-cnn]", "select=[episodic-oracle,validation,consistency]"]
    assert main(["tune", *words, *narrow, "--out", str(tmp_path), "--format", "csv"]) == 0
    found = capsys.readouterr().out
    assert "digits-c,episodic,digits-cnn,episodic-oracle,oracle,tent,lr=" in found
    assert "digits-c,continual,digits-cnn,validation,validation,tent,lr=" in found
    assert main(["table", str(tmp_path), "--format", "csv"]) == 0
    assert capsys.readouterr().out == found
