"""CCC: the path through the severities, the pairs, accuracy matrices and their calibration, the images of the stream."""

import io
import json
import os
import pickle
from itertools import islice, pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import tta
from tta.cli import main
from tta.datasets import CORRUPTIONS, ccc, corrupt
from tta.datasets.ccc import AccuracyMatrix, Calibration, calibrate, pairs, path, pool

# torchvision announces the move of its codecs to TorchCodec, which the oldest supported release does not know
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

quick = settings(max_examples=40, deadline=None)
GRID = np.arange(21)


def falling(first=4.0, second=4.0, floor=10.0):
    """Accuracies that fall evenly with both severities."""
    return (96 - first * GRID[:, None] - second * GRID).clip(min=floor)


EVERY = {pair: falling(3 + len(pair[0]) % 3, 3 + len(pair[1]) % 4) for pair in permutations(CORRUPTIONS, 2)}


def make(**given):
    return tta.stream(
        "digits-c", protocol="ccc", **{"matrix": EVERY, "samples": 50, "total": 900, "speed": 10, **given}
    )


def walk(**given):
    (domain,) = make(**given).domains
    return domain


# ---------------------------------------------------------------------- pairs and paths


def test_pools_are_the_papers():
    assert [len(pool(target)) for target in (40, 20, 0)] == [14, 13, 4]
    assert set(CORRUPTIONS) - set(pool(40)) == {"brightness"}
    assert set(pool(40)) - set(pool(20)) == {"jpeg_compression"}
    assert pool(19.9) == ("gaussian_noise", "shot_noise", "impulse_noise", "contrast")


# What the released code (https://github.com/oripress/CCC, generate.py) draws, and the paths it finds in two made-up matrices.
RELEASED_PAIRS = {
    (40, 43): "gaussian_noise glass_blur elastic_transform pixelate impulse_noise snow motion_blur",
    (40, 44): "zoom_blur frost elastic_transform jpeg_compression shot_noise impulse_noise zoom_blur",
    (40, 45): "glass_blur zoom_blur snow glass_blur shot_noise glass_blur motion_blur",
    (20, 43): "gaussian_noise glass_blur elastic_transform pixelate impulse_noise snow motion_blur",
    (20, 44): "zoom_blur frost elastic_transform shot_noise impulse_noise zoom_blur defocus_blur",
    (20, 45): "glass_blur zoom_blur snow glass_blur shot_noise glass_blur motion_blur",
    (0, 43): "gaussian_noise impulse_noise shot_noise contrast impulse_noise gaussian_noise contrast",
    (0, 44): "contrast gaussian_noise shot_noise contrast shot_noise impulse_noise gaussian_noise",
    (0, 45): "impulse_noise contrast impulse_noise gaussian_noise impulse_noise gaussian_noise contrast",
}  # fmt: skip


@pytest.mark.parametrize(("target", "seed"), RELEASED_PAIRS)
def test_pairs_are_the_released_generators(target, seed):
    first = list(islice(pairs(pool(target), seed), len(RELEASED_PAIRS[target, seed].split()) - 1))
    assert " ".join([first[0][0], *(second for _, second in first)]) == RELEASED_PAIRS[target, seed]


@quick
@given(names=st.lists(st.sampled_from(CORRUPTIONS), min_size=2, unique=True), seed=st.integers(0, 2**40))
def test_a_pair_starts_where_the_last_one_ended(names, seed):
    some = list(islice(pairs(names, seed), 60))
    assert all(first != second and {first, second} <= set(names) for first, second in some)
    assert all(before[1] == after[0] for before, after in pairwise(some))


ROWS, COLUMNS = np.mgrid[:21, :21]
FORMULAS = {
    "curved": 76 * np.exp(-((ROWS / 9.0) ** 2) - (COLUMNS / 14.0) ** 1.5),
    "rough": (76 - 2.5 * ROWS - 3.0 * COLUMNS).clip(min=2) + (ROWS * 7 + COLUMNS * 5) % 11 / 2.0,
}
RELEASED_PATHS = {
    ("curved", 40): "8,0 7,0 7,1 7,2 7,3 6,3 6,4 6,5 6,6 5,6 5,7 4,7 4,8 4,9 3,9 2,9 2,10 1,10 1,11 0,11",
    ("curved", 20): "11,0 10,0 10,1 10,2 10,3 10,4 10,5 9,5 9,6 9,7 9,8 8,8 8,9 8,10 8,11 7,11 7,12 6,12 6,13 5,13 5,14 5,15 4,15 4,16 3,16 2,16 2,17 1,17 0,17",
    ("curved", 0): "20,0 20,1 20,2 20,3 20,4 20,5 20,6 20,7 20,8 20,9 20,10 20,11 20,12 20,13 20,14 20,15 20,16 20,17 20,18 20,19 20,20 19,20 18,20 17,20 16,20 15,20 14,20 13,20 12,20 11,20 10,20 9,20 8,20 7,20 6,20 5,20 4,20 3,20 2,20 1,20 0,20",
    ("rough", 40): "17,0 16,0 15,0 14,0 14,1 14,2 13,2 13,3 12,3 11,3 11,4 10,4 9,4 9,5 9,6 8,6 8,7 7,7 6,7 6,8 5,8 5,9 4,9 4,10 3,10 3,11 2,11 2,12 1,12 0,12",
    ("rough", 20): "20,0 20,1 20,2 20,3 19,3 19,4 18,4 18,5 17,5 16,5 16,6 16,7 15,7 15,8 14,8 13,8 13,9 12,9 12,10 11,10 11,11 10,11 10,12 9,12 8,12 8,13 7,13 7,14 6,14 6,15 5,15 4,15 4,16 4,17 3,17 2,17 2,18 2,19 1,19 0,19",
    ("rough", 0): "20,0 20,1 20,2 20,3 20,4 20,5 20,6 20,7 20,8 20,9 19,9 19,10 19,11 19,12 19,13 18,13 17,13 16,13 16,14 16,15 15,15 14,15 13,15 13,16 13,17 12,17 11,17 10,17 10,18 10,19 9,19 8,19 7,19 7,20 6,20 5,20 4,20 3,20 2,20 1,20 0,20",
}  # fmt: skip


@pytest.mark.parametrize(("formula", "target"), RELEASED_PATHS)
def test_path_is_the_released_generators(formula, target):
    assert " ".join(f"{r},{c}" for r, c in path(FORMULAS[formula], target)) == RELEASED_PATHS[formula, target]


accuracies = st.integers(2, 7).flatmap(
    lambda side: st.lists(st.integers(0, 100), min_size=side * side, max_size=side * side).map(
        lambda values: np.array(values, dtype=float).reshape(side, side)
    )
)


@quick
@given(accuracy=accuracies, target=st.integers(0, 100))
def test_path_follows_its_rule(accuracy, target):
    """The rule as its docstring has it, by recursion over whole paths."""

    def miss(cells):
        return abs(sum(accuracy[cell] for cell in cells) / len(cells) - target)

    def best(row, column):
        if row == 0:
            return [(row, column)]
        rest = [best(row, column + 1)] if column + 1 < len(accuracy) else []
        return min(
            ([(row, column), *cells] for cells in [*rest, best(row - 1, column)]), key=lambda p: round(miss(p), 9)
        )

    cells = path(accuracy, target)
    assert cells[0][0] > 0 == cells[0][1]
    assert cells[-1][0] == 0
    assert all((r - r2, c2 - c) in ((1, 0), (0, 1)) for (r, c), (r2, c2) in pairwise(cells))
    assert miss(cells) == pytest.approx(min(miss(best(row, 0)) for row in range(1, len(accuracy))))


def test_a_path_along_an_even_slope_keeps_every_cell_near_the_target():
    for target in (30, 50, 70):
        cells = path(falling(), target)
        values = np.array([falling()[cell] for cell in cells])
        assert abs(values.mean() - target) <= 2
        assert np.abs(values - target).max() <= 4


# ---------------------------------------------------------------------- the stream


@pytest.mark.parametrize("target", [40, 20, 60.5])
def test_stops_follow_the_pairs_and_their_paths(target):
    domain = walk(target=target, seed=3)
    expected = [
        ccc.Step(*pair, row / 4, column / 4, EVERY[pair][row, column])
        for pair in islice(pairs(pool(target), 3), 20)
        for row, column in path(EVERY[pair], target)
    ]
    assert list(domain.steps) == expected[: len(domain.steps)]
    assert len(domain.steps) == 90
    for before, after in pairwise(domain.steps):
        if (before.first, before.second) == (after.first, after.second):
            moved = before.severity_1 - after.severity_1, after.severity_2 - before.severity_2
            assert moved in ((0.25, 0), (0, 0.25))
        else:  # one corruption alone, the same on both sides
            assert before.severity_1 == after.severity_2 == 0
            assert before.second == after.first


def test_each_stop_has_different_images_drawn_anew():
    stream = make(speed=20, total=400)
    (domain,) = stream.domains
    assert stream.samples == len(stream.order) == 400
    assert stream.order[:, 1].tolist() == list(range(400))
    parts = domain.index.split(20)
    assert all(len(part.unique()) == 20 for part in parts)
    assert len({tuple(sorted(part.tolist())) for part in parts}) == len(parts)


def test_where_there_are_too_few_images_all_come_before_any_comes_again():
    domain = walk(samples=10, speed=24, total=60)
    known = tta.stream("digits-c", samples=10, corruptions=["fog"]).domains[0].index
    for stop in domain.index.split(24)[:2]:
        for part in (stop[:10], stop[10:20]):
            assert sorted(part.tolist()) == sorted(known.tolist())
        assert len(stop[20:].unique()) == 4


def test_a_shorter_stream_is_the_beginning_of_a_longer_one():
    short, long = walk(total=333, seed=5), walk(total=900, seed=5)
    assert torch.equal(short.index, long.index[:333])
    assert short.steps == long.steps[: len(short.steps)]
    positions = torch.tensor([0, 9, 10, 332])
    assert torch.equal(short.images(positions), long.images(positions))


def test_left_out_the_length_is_the_papers_for_the_images_there_are():
    assert make(samples=20, total=None).samples == 150 * 20
    assert len(walk(samples=20, total=None, speed=1000).steps) == 3


def test_images_are_clean_ones_under_both_corruptions():
    stream = make(total=200, seed=2, batch_size=64)
    (domain,) = stream.domains
    clean, labels, index = ccc_clean(50)
    for batch, positions in zip(stream, torch.arange(200).split(64), strict=True):
        assert torch.equal(batch.index, domain.index[positions])
        for image, label, number, position in zip(batch.images, batch.labels, batch.index, positions, strict=True):
            at = (index == number).nonzero()[0]
            assert label == labels[at]
            step = domain.steps[position // 10]
            once = corrupt(clean[at], step.first, step.severity_1, seed=2, index=position[None])
            twice = corrupt(once, step.second, step.severity_2, seed=2, index=position[None])
            assert torch.equal(image, twice[0] / 255)


def ccc_clean(samples):
    domain = tta.stream("digits-c", samples=samples, corruptions=["fog"]).domains[0].clean()
    return domain.images(torch.arange(samples)), domain.labels, domain.index


def test_a_dataset_of_ones_own_is_the_clean_images():
    images, labels, _ = ccc_clean(30)
    kept = {"protocol": "ccc", "matrix": EVERY, "total": 60, "speed": 10, "recipe": "cifar"}
    stored = tta.stream({"mine": TensorDataset(images, labels)}, **kept)
    floating = tta.stream({"mine": TensorDataset(images / 255, labels)}, **kept)
    for a, b in zip(stored, floating, strict=True):
        assert torch.equal(a.images, b.images)
    assert (
        "imagenet recipe" in tta.stream({"mine": TensorDataset(images, labels)}, **{**kept, "recipe": None}).origins[0]
    )


def test_the_stream_is_printed_and_drawn_before_an_image_is_read(monkeypatch, tmp_path):
    from tta.report.schedule import schedule

    def fail(*_, **__):
        raise AssertionError("an image was made")

    monkeypatch.setattr("tta.datasets.ccc.corrupt", fail)
    stream = make(corruptions=["fog", "snow", "contrast"], target=40)
    assert "protocol ccc (reset never)" in str(stream)
    assert "two corruptions at a time, from scikit-learn's digits: " in str(stream)
    assert "% by the given matrix (target 40 %)" in str(stream)
    above, _ = schedule(stream).axes
    assert len(above.patches) == 3
    assert above.get_ylim() == (0, 5)
    AccuracyMatrix(EVERY).save(tmp_path / "matrix.npz")
    words = ["protocol=ccc", f"matrix={tmp_path / 'matrix.npz'}", "total=2000", "-o", str(tmp_path / "a.png")]
    assert main(["plot", "schedule", "digits-c", *words]) == 0
    assert (tmp_path / "a.png").exists()


def test_the_manifest_tells_the_path_and_the_matrix():
    def described(**given):
        found = make(total=40, **given).describe()
        return json.loads(json.dumps(found["domains"]["ccc"]))

    told = described()
    assert told["calibration"] is None
    assert told["pairs"][0] == "+".join(walk().pairs[0])
    slower = {pair: values - 1 for pair, values in EVERY.items()}
    assert described(matrix=slower)["matrix"] != told["matrix"]
    assert described(target=50)["path"] != told["path"]


# ---------------------------------------------------------------------- matrices on disk


def test_matrices_are_read_as_they_were_written(tmp_path):
    AccuracyMatrix(EVERY).save(tmp_path / "a.npz")
    read = AccuracyMatrix.read(tmp_path / "a.npz")
    assert read.calibration is None
    assert read.of_pair.keys() == EVERY.keys()
    assert all(np.array_equal(read[pair], EVERY[pair]) for pair in EVERY)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_as_the_published_one_is_read(tmp_path, protocol):
    published = {"n1_elastic_n2_gaussian_noise": falling(2, 3), "n1_motion_blur_n2_jpeg": falling(3, 2).astype("f4")}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(published, protocol))
    read = AccuracyMatrix.read(tmp_path / "a.pickle")
    assert list(read.of_pair) == [("elastic_transform", "gaussian_noise"), ("motion_blur", "jpeg_compression")]
    assert np.array_equal(read["elastic_transform", "gaussian_noise"], falling(2, 3))


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_pickle_is_run(tmp_path):
    for number, bad in enumerate([Bomb(tmp_path / "made"), {"n1_fog_n2_snow": Bomb(tmp_path / "made")}]):
        file = tmp_path / f"{number}.pickle"
        file.write_bytes(pickle.dumps(bad))
        with pytest.raises(
            ValueError, match=r"neither an \.npz file nor a pickle of numpy arrays \(it holds .*mkdir\)"
        ):
            AccuracyMatrix.read(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "neither an .npz file nor a pickle"),
        (b"accuracy,1,2\n", "neither an .npz file nor a pickle"),
        (pickle.dumps([falling()]), "holds a list; expected arrays by names like n1_fog_n2_snow"),
        (pickle.dumps({"fog": falling()}), "named after its pair, like n1_fog_n2_snow; got 'fog'"),
        (
            pickle.dumps({"n1_fog_n2_snow": falling()[:5]}),
            r"n1_fog_n2_snow is \(21, 21\) numbers; got float64 of shape \(5",
        ),
        (pickle.dumps({"n1_fog_n2_snow": falling() / 100}), "in percent, 0 to 100; these are at most 1"),
        (pickle.dumps({"n1_fog_n2_snow": falling() + 40}), "in percent, 0 to 100; got 50 to 136"),
        (pickle.dumps({"n1_fog_n2_snow": falling() * np.nan}), "in percent"),
    ],
)
def test_what_is_no_matrix_is_named(tmp_path, stored, message):
    (tmp_path / "a.pickle").write_bytes(stored)
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix.read(tmp_path / "a.pickle")


def test_a_missing_file_is_answered_with_where_to_find_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"The published one is ccc_accuracy_matrix\.pickle of https"):
        make(matrix=str(tmp_path / "a.npz"))


def test_an_npz_with_objects_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, n1_fog_n2_snow=np.array([Bomb(tmp_path / "made")], dtype=object))
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="allow_pickle"):
        AccuracyMatrix.read(tmp_path / "a.npz")
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------------- calibration


class Brightness(nn.Module):
    """Says class 1 for bright images, 0 for others; counts its calls."""

    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.calls = 0

    def forward(self, x):
        assert not self.training
        assert x.dtype == torch.float32
        self.calls += 1
        bright = x.mean((1, 2, 3)) - self.threshold
        return torch.stack([-bright, bright], 1)


@pytest.fixture
def grey():
    """Images of one level each, darker ones of class 0; contrast and brightness change them predictably."""
    levels = torch.linspace(20, 230, 22).round().to(torch.uint8)
    return levels[:, None, None, None].expand(-1, 3, 8, 8).contiguous(), (levels > 127).long()


def test_calibration_measures_the_accuracy_under_both(grey):
    images, labels = grey
    pair = ("brightness", "fog")
    found = calibrate(Brightness(), images, labels, of=[pair], grid=0.25, recipe="cifar", seed=4)
    for row, column in [(0, 0), (3, 0), (0, 20), (7, 9), (20, 20)]:
        once = corrupt(images, "brightness", row / 4, seed=4)
        twice = corrupt(once, "fog", column / 4, seed=4).float() / 255
        right = (twice.mean((1, 2, 3)) > 0.5).long() == labels
        assert found[pair][row, column] == pytest.approx(100 * right.double().mean().item())
    assert found[pair][0, 0] == 100
    assert len(np.unique(found[pair])) > 3


def test_a_coarse_grid_is_interpolated_linearly(grey):
    pair = ("brightness", "fog")
    coarse, fine = (calibrate(Brightness(), *grey, of=[pair], grid=grid, recipe="cifar")[pair] for grid in (1, 0.25))
    assert np.array_equal(coarse[::4, ::4], fine[::4, ::4])
    assert coarse[1, 0] == pytest.approx(0.75 * fine[0, 0] + 0.25 * fine[4, 0])
    middle = fine[4:9:4, 8:13:4].mean()
    assert coarse[6, 10] == pytest.approx(middle)


def test_calibration_leaves_the_model_as_it_was(grey):
    model = nn.Sequential(nn.Identity(), Brightness())
    model.train()
    model[0].eval()
    calibrate(model, *grey, of=[("brightness", "fog")], grid=5)
    assert [part.training for part in model.modules()] == [True, False, True]


def test_calibration_shows_its_progress_and_measures_what_is_asked_for(grey):
    seen = []

    def progress(cells):
        for cell in cells:
            yield cell
            seen.append(cell)

    calibration = Calibration(Brightness(), *grey, grid=2.5, progress=progress)
    assert seen == []
    first = calibration["fog", "snow"]
    assert len(seen) == 9
    assert calibration["fog", "snow"] is first
    assert len(seen) == 9
    assert calibrate(lambda x: x.mean((2, 3)), *grey, of=[("fog", "snow")], grid=5)["fog", "snow"].shape == (21, 21)


def test_what_was_measured_is_kept_for_the_same_model_images_and_settings(grey, tmp_path):
    def calls(threshold=0.5, images=grey[0], of=("brightness", "fog"), **settings):
        model = Brightness(threshold)
        found = calibrate(model, images, grey[1], of=[of], cache=tmp_path, **{"grid": 5, **settings})
        assert of in found.of_pair
        return model.calls

    assert calls() == 4
    assert calls() == 0
    assert calls(of=("fog", "brightness")) == 4  # joins the file
    assert calls() == calls(of=("fog", "brightness")) == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert calls(threshold=0.4) == calls(images=grey[0] + 1) == calls(seed=1) == calls(recipe="cifar") == 4
    assert calls(grid=2.5) == 9
    assert len(list(tmp_path.iterdir())) == 6


def test_a_calibrated_stream_is_called_ccc_style(cnn, tmp_path):
    kept = {"protocol": "ccc", "samples": 40, "total": 60, "speed": 5, "target": 60}
    stream = tta.stream("digits-c", model=cnn, per_cell=20, grid=5, cache=tmp_path, **kept)
    assert stream.protocol == "ccc-style"
    assert "calibration on 20 images, grid 5" in stream.origins[0]
    result = tta.evaluate(tta.adapt(cnn, "source"), stream, progress=False)
    assert list(result.errors) == ["ccc-style"]
    assert result.manifest["data"]["protocol"] == "ccc-style"
    assert result.manifest["data"]["domains"]["ccc-style"]["calibration"]["images"] == 20
    assert set(result.manifest["data"]["settings"]) == {"samples", "total", "speed", "target", "per_cell", "grid"}
    for name in ("terminal", "markdown", "csv", "latex", "html"):
        assert "ccc-style" in tta.compare([result]).format(name)
    # a file of it says so too
    (file,) = tmp_path.iterdir()
    assert tta.stream("digits-c", matrix=str(file), **kept).protocol == "ccc-style"
    assert tta.stream("digits-c", matrix=EVERY, **kept).protocol == "ccc"


def test_command_line_calibrates_on_the_runs_model(tmp_path, capsys):
    words = [
        "digits-c",
        "source",
        "norm",
        "protocol=ccc",
        "total=200",
        "speed=20",
        "batch_size=50",
        "per_cell=10",
        "grid=5",
    ]
    words += ["corruptions=[fog,contrast,snow]", f"cache={tmp_path / 'kept'}"]
    assert main(["run", *words, "--out", str(tmp_path / "a")]) == 0
    told = capsys.readouterr()
    assert "ccc-style" in told.out
    assert "calibrating on digits-cnn; the protocol is called ccc-style" in " ".join(told.err.split())
    written = tmp_path.rglob("digits-c_ccc-style_seed0/*/result.json")
    assert sorted(file.parent.name for file in written) == ["norm", "source"]
    (kept,) = (tmp_path / "kept").iterdir()
    found = json.loads(next(tmp_path.rglob("norm/result.json")).read_text())
    assert found["errors"].keys() == {"ccc-style"}
    assert main(["run", *words[:-1], f"matrix={kept}", "--out", str(tmp_path / "b")]) == 0
    again = json.loads(next((tmp_path / "b").rglob("norm/result.json")).read_text())
    assert again["errors"] == found["errors"]


@pytest.mark.slow
def test_a_calibrated_model_has_the_accuracy_to_expect():
    """On images and draws that the calibration has not seen: 48.8 % where 46.9 were to expect (target 40).

    At target 60 it was 69.0 where 63.3 were to expect, 73.3 and 62.3 with grid=1: contrast's accuracy falls steeply between
    the severities that are measured.
    """
    model = tta.load_model("digits-cnn")
    given = {"corruptions": ["fog", "contrast", "glass_blur"], "target": 40, "speed": 25, "total": 1000, "seed": 1}
    stream = tta.stream("digits-c", protocol="ccc", model=model, **given)
    expected = np.mean([step.accuracy for step in stream.domains[0].steps])
    accuracy = 100 - tta.evaluate(tta.adapt(model, "source"), stream, progress=False).mean_error
    assert abs(accuracy - expected) < 4
