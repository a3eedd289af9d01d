"""The corruptions: what they promise. Whether they are the published ones: test_published_corruptions.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.io import write_jpeg, write_png

from tta.datasets import corruptions
from tta.datasets.corruptions import CORRUPTIONS, RECIPES, VALIDATION_CORRUPTIONS, apply, corrupt, draw, draws, frost

# torchvision announces the move of its codecs to TorchCodec, which the oldest supported release does not know
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

ALL = CORRUPTIONS + VALIDATION_CORRUPTIONS
WITHOUT_DRAWS = {
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
}


def pictures(count: int, height: int = 32, width: int = 32, detail: float = 40.0) -> Tensor:
    """Coloured gradients with some detail, uint8; a corner is black, one is white."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase = rng.uniform(0, 6, (count, 3, 1, 1))
    smooth = 128 + 90 * np.sin(5 * x + phase) * np.cos(4 * y - phase)
    image = (smooth + detail * rng.uniform(-1, 1, smooth.shape)).clip(0, 255).astype(np.uint8)
    image[:, :, :5, :5] = 0
    image[:, :, -5:, -5:] = 255
    return torch.from_numpy(image)


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [(32, 32), (24, 41), (20, 300)])
def test_gives_images_of_the_same_shape_and_type_and_leaves_the_given_ones_alone(
    name: str, recipe: str, size: tuple[int, int]
) -> None:
    images = pictures(3, *size)
    given = images.clone()
    damaged = corrupt(images, name, recipe=recipe)
    assert damaged.shape == images.shape
    assert damaged.dtype == torch.uint8
    assert not torch.equal(damaged, images)
    assert torch.equal(images, given)
    assert corrupt(images[:0], name, recipe=recipe).shape == (0, 3, *size)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_an_image_is_damaged_alike_in_every_batch(name: str, data: st.DataObject) -> None:
    images, index = pictures(6), torch.tensor([3, 1, 4, 1_000_000, 5, 9])
    order = torch.tensor(data.draw(st.permutations(range(6))))
    cut = data.draw(st.integers(1, 5))
    severity, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(-(2**70), 2**70))
    recipe = data.draw(st.sampled_from(RECIPES))
    whole = corrupt(images, name, severity, seed, recipe, index)
    parts = [corrupt(images[o], name, severity, seed, recipe, index[o]) for o in order.split(cut)]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("name", ALL)
def test_working_in_parts_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(5)
    whole = corrupt(images, name)
    monkeypatch.setattr("tta.datasets.corruptions.recipes._VALUES_AT_ONCE", 2 * images[0].numel())
    assert torch.equal(corrupt(images, name), whole)


@pytest.mark.parametrize("name", ALL)
def test_another_seed_or_number_damages_differently_where_anything_is_drawn(name: str) -> None:
    images = pictures(1).expand(8, -1, -1, -1)
    damaged = corrupt(images, name, severity=4)
    again = corrupt(images, name, severity=4, seed=1)
    shifted = corrupt(images, name, severity=4, index=torch.arange(8) + 100)
    if name in WITHOUT_DRAWS:
        assert torch.equal(damaged, again)
        assert (damaged == damaged[:1]).all()
    else:
        assert not torch.equal(damaged, again)
        assert not torch.equal(damaged, shifted)
        assert len(torch.unique(damaged.flatten(1), dim=0)) > 4  # angles a degree apart blur a small image alike


@pytest.mark.parametrize("name", ALL)
def test_a_higher_severity_moves_images_further(name: str) -> None:
    images = pictures(64, detail=10)
    distances = [
        (corrupt(images, name, severity=severity).float() - images).abs().mean().item() for severity in range(1, 6)
    ]
    if name in {"glass_blur", "motion_blur", "frost", "elastic_transform", "spatter", "saturate"}:
        # The published constants do not order these: glass blur's fifth severity smooths more than its fourth and so
        # undoes more, motion blur's third and fourth have the same sigma, frost takes away more of the image's own
        # light as it adds its own, the elastic transform's affine jitter shrinks while its displacements grow, spatter
        # goes from water to mud, and saturate from less colour to more.
        assert min(distances) > 0
    else:
        assert distances == sorted(distances)
        assert distances[4] > distances[0] > 0


def test_zero_noise_is_the_identity() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    nothing = {"noise": torch.zeros(1, 3, 16, 16)}
    assert torch.equal(apply("gaussian_noise", images, nothing, severity=5), images)


def test_an_unmoved_glass_or_elastic_image_is_the_identity() -> None:
    images = pictures(2)
    stay = {"rows": torch.zeros(2, 1, 32, 32), "columns": torch.zeros(2, 1, 32, 32)}
    assert torch.equal(apply("glass_blur", images, stay, severity=1), images)
    still = {"points": torch.zeros(2, 3, 2), "rows": torch.zeros(2, 32, 32), "columns": torch.zeros(2, 32, 32)}
    assert torch.equal(apply("elastic_transform", images, still, severity=5), images)


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "gaussian_blur"]
)
def test_a_flat_image_stays_flat(name: str, recipe: str, severity: int) -> None:
    images = torch.arange(0, 256, 5, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32)
    # As published: a disk that touches the border of its kernel is smoothed across it and sums to a little over 1.
    gain = 1.0107858 if (name, recipe, severity) == ("defocus_blur", "imagenet", 5) else 1
    flat = (images.double() * gain).clamp(max=255).to(torch.uint8)
    assert torch.equal(corrupt(images, name, severity, recipe=recipe), flat)


@pytest.mark.parametrize("name", ALL)
def test_corrupt_is_apply_after_draw(name: str) -> None:
    images, index = pictures(3), torch.tensor([7, 5, 6])
    drawn = draw(name, index, severity=3, seed=11, size=(32, 32))
    assert bool(drawn) == (name not in WITHOUT_DRAWS)
    assert all(len(numbers) == 3 for numbers in drawn.values())
    assert torch.equal(apply(name, images, drawn, severity=3), corrupt(images, name, severity=3, seed=11, index=index))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ALL)
def test_same_result_on_a_gpu(name: str, recipe: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = pictures(16)
    damaged = corrupt(images.cuda(), name, recipe=recipe)
    assert damaged.device.type == "cuda"
    assert (damaged.cpu().int() - corrupt(images, name, recipe=recipe).int()).abs().max() <= 1


# --- between whole severities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ALL)
def test_severity_0_leaves_images_alone(name: str, recipe: str) -> None:
    images = pictures(2)
    for severity in (0, 0.0):
        undamaged = corrupt(images, name, severity, recipe=recipe)
        assert torch.equal(undamaged, images)
        assert undamaged.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_whole_severities_are_what_they_were(name: str) -> None:
    """Their constants are pinned in test_published_corruptions.py; here that the type of the number does not matter."""
    images = pictures(2)
    for severity in (1, 5):
        expected = corrupt(images, name, severity)
        assert torch.equal(corrupt(images, name, float(severity)), expected)
        assert torch.equal(corrupt(images, name, np.int64(severity)), expected)  # type: ignore[arg-type]
    keys = draws.keys(torch.arange(2), seed=7, purpose="gaussian_noise 3 noise")
    drawn = draw("gaussian_noise", torch.arange(2), severity=3, seed=7, size=(32, 32))["noise"]
    assert torch.equal(drawn, draws.normal(keys, (3, 32, 32)))


# The table at severities 0 to 5 of the released generator of Press et al., NeurIPS 2023, which interpolates it linearly.
RELEASED = {
    "gaussian_noise": [0, 0.08, 0.12, 0.18, 0.26, 0.38],
    "impulse_noise": [0, 0.03, 0.06, 0.09, 0.17, 0.27],
    "defocus_blur": [(0, 0), (3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    "motion_blur": [(0, 0), (10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    "zoom_blur": [(1, 1, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)],
    "frost": [(1, 0), (1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    "fog": [(0, 2), (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    "brightness": [0, 0.1, 0.2, 0.3, 0.4, 0.5],
    "contrast": [1, 0.4, 0.3, 0.2, 0.1, 0.05],
    "pixelate": [1, 0.6, 0.5, 0.4, 0.3, 0.25],
}
QUARTERS = [quarter / 4 for quarter in range(1, 20) if quarter % 4]


@pytest.mark.parametrize("severity", QUARTERS)
def test_between_whole_severities_the_constants_are_the_released_generators(severity: float) -> None:
    def interpolated(values: list) -> np.ndarray:
        columns = np.array(values, dtype=float).reshape(6, -1).T
        return np.array([np.interp(severity, range(6), column) for column in columns])

    for name, values in RELEASED.items():
        np.testing.assert_allclose(
            np.atleast_1d(corruptions.constants(name, severity, "imagenet")), interpolated(values), rtol=1e-12
        )
    photons = 1 / interpolated([0, 1 / 60, 1 / 25, 1 / 12, 1 / 5, 1 / 3])[0]
    assert corruptions.constants("shot_noise", severity, "imagenet") == pytest.approx(photons, rel=1e-12)
    sigma, reach, passes = interpolated([(0, 0, 0), (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)])
    glass = corruptions.constants("glass_blur", severity, "imagenet")
    assert glass == (pytest.approx(sigma), round(max(1, reach)), round(passes))
    quality = round(interpolated([85, 25, 18, 15, 10, 7])[0])
    assert corruptions.constants("jpeg_compression", severity, "imagenet") == quality
    amplitude, _, jitter = interpolated([(0, 0, 0), (488, 0, 24.4), (488, 0, 48.8), (12.2, 0, 4.88), (17.08, 0, 4.88), (29.28, 0, 4.88)])  # fmt: skip
    elastic = corruptions.constants("elastic_transform", severity, "imagenet")
    assert (elastic[0], elastic[2]) == (pytest.approx(amplitude), pytest.approx(jitter))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [name for name in ALL if name != "spatter"])
def test_severities_in_between_damage_images_alike_in_every_batch(name: str, recipe: str) -> None:
    images, index = pictures(4, detail=10), torch.tensor([3, 1, 4, 1_000_000])
    for severity in (0.25, 2.5, 4.75):
        whole = corrupt(images, name, severity, recipe=recipe, index=index)
        parts = [corrupt(images[one], name, severity, recipe=recipe, index=index[one]) for one in ([2], [0, 3], [1])]
        assert torch.equal(torch.cat(parts), whole[[2, 0, 3, 1]])


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "fog", "brightness", "contrast"])
def test_a_quarter_more_moves_images_further(name: str) -> None:
    images = pictures(64, detail=10)
    distances = [(corrupt(images, name, q / 4).float() - images).abs().mean().item() for q in range(21)]
    assert distances == sorted(distances)
    assert distances[0] == 0 < distances[1]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    images = pictures(2)
    with pytest.raises(ValueError, match=r"No corruption 'fogg'\. Did you mean 'fog'\?.*gaussian_noise"):
        corrupt(images, "fogg")
    for severity in (-1, 6, 2.3, 5.25, float("nan"), "5", None):
        with pytest.raises(ValueError, match=r"severity is 0 .none. to 5, in steps of 0\.25; got"):
            corrupt(images, "fog", severity=severity)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"spatter has whole severities only; got 3\.5"):
        corrupt(images, "spatter", severity=3.5)
    with pytest.raises(ValueError, match=r"No recipe 'svhn'.*There are: .*cifar"):
        corrupt(images, "fog", recipe="svhn")
    with pytest.raises(ValueError, match=r"uint8.*got torch\.float32 of shape \(2, 3, 32, 32\).*round"):
        corrupt(images.float(), "fog")
    with pytest.raises(ValueError, match=r"got torch\.uint8 of shape \(3, 32, 32\)"):
        corrupt(images[0], "fog")
    with pytest.raises(ValueError, match=r"got ndarray.*permute"):
        corrupt(images.numpy(), "fog")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"each of the 2 images.*got shape \(3,\)"):
        corrupt(images, "fog", index=torch.arange(3))
    with pytest.raises(ValueError, match=r"int64 image numbers; got torch\.float32"):
        corrupt(images, "fog", index=torch.zeros(2))


def test_frost_takes_a_folder_of_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one \.png.*found none"):
        corrupt(pictures(2), "frost", frost_photographs=tmp_path)
    write_png(torch.full((3, 200, 400), 100, dtype=torch.uint8), str(tmp_path / "b.png"))
    black = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    assert corrupt(black, "frost", 5, frost_photographs=tmp_path).unique().tolist() == [45]  # .45 of 100
    write_png(torch.full((3, 200, 400), 200, dtype=torch.uint8), str(tmp_path / "a.png"))
    first = {"picture": torch.tensor([0.0, 0.9]), "top": torch.rand(2), "left": torch.rand(2)}
    sorted_by_name = apply("frost", black[:2], first, severity=5, frost_photographs=tmp_path)
    assert sorted_by_name[:, 0, 0, 0].tolist() == [90, 45]
    write_png(torch.zeros(3, 100, 100, dtype=torch.uint8), str(tmp_path / "c.png"))
    with pytest.raises(ValueError, match=r"at least as large as the images, 32 x 32; number 2 has 20 x 20"):
        corrupt(black, "frost", frost_photographs=tmp_path)


def shares(folder: Path, count: int) -> list[float]:
    """Share of the draws of each picture, recognised by its grey level: 30, 60, ..."""
    drawn = corrupt(torch.zeros(600, 3, 32, 32, dtype=torch.uint8), "frost", 5, frost_photographs=folder)
    levels = drawn[:, 0, 0, 0].float() / 0.45
    return [float((levels - 30 * (n + 1)).abs().lt(4).float().mean()) for n in range(count)]


def test_the_sixth_published_photograph_is_never_drawn(tmp_path: Path) -> None:
    """make_cifar_c.py and make_imagenet_c.py (hendrycks/robustness 8190fe3) list six and draw ``np.random.randint(5)``."""
    endings = ["png", "png", "png", "jpg", "jpg", "jpg"]
    for n, ending in enumerate(endings):
        level = torch.full((3, 200, 200), 30 * (n + 1), dtype=torch.uint8)
        (write_png if ending == "png" else write_jpeg)(level, str(tmp_path / f"frost{n + 1}.{ending}"))
    found = shares(tmp_path, 6)
    assert found[5] == 0
    assert sum(found) == pytest.approx(1)
    assert min(found[:5]) > 0.13  # a fifth each, within 4 standard deviations of 600 draws
    (tmp_path / "frost6.jpg").rename(tmp_path / "mine.jpg")  # another folder is used as it is
    assert min(shares(tmp_path, 6)) > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_texture_has_the_statistics_of_frost(recipe: str) -> None:
    """Of the five photographs that the released generator uses: mean .64, each as bright, uneven and blue as one of them."""
    textures = torch.stack(frost.textures(recipe)).float() / 255
    assert textures.mean((1, 2, 3)).tolist() == pytest.approx([0.513, 0.811, 0.811, 0.597, 0.484], abs=0.005)
    assert textures.mean(1).std((1, 2)).tolist() == pytest.approx([0.07, 0.086, 0.086, 0.115, 0.169], abs=0.01)
    assert (textures[:, 2].mean((1, 2)) > textures[:, 0].mean((1, 2))).all()  # cool
    assert textures.flatten(1).std(0).mean() > 0.1  # five different ones
    grey = textures.mean(1)
    skew = ((grey - grey.mean((1, 2), keepdim=True)) ** 3).mean((1, 2))
    assert (skew > 0).tolist() == [True, False, False, True, True]  # dark gaps in the two bright ones


def test_black_images_under_frost_are_as_bright_as_with_the_photographs() -> None:
    """3000 draws of the released CIFAR recipe at severity 5: mean 72.90, standard deviation of the images' means 17.47."""
    layer = corrupt(torch.zeros(3000, 3, 32, 32, dtype=torch.uint8), "frost", 5).float().mean((1, 2, 3))
    assert layer.mean().item() == pytest.approx(72.90, abs=1.5)
    assert layer.std().item() == pytest.approx(17.47, abs=1.5)


# --- random numbers --------------------------------------------------------------------------------------------------


def test_the_sequence_is_splitmix64() -> None:
    # the first five outputs of the authors' C code for seed 1234567
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    drawn = draws.uniform(torch.tensor([1234567]), (5,))[0]
    assert drawn.tolist() == [(bits >> 11) / 2**53 for bits in published]


def test_the_numbers_follow_their_distributions_and_neighbours_are_unrelated() -> None:
    keys = draws.keys(torch.arange(400), seed=0, purpose="test")
    uniform, normal = draws.uniform(keys, (501,)), draws.normal(keys, (501,))
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    other_seed = draws.normal(draws.keys(torch.arange(400), seed=1, purpose="test"), (501,))
    other_purpose = draws.normal(draws.keys(torch.arange(400), seed=0, purpose="tesu"), (501,))
    for a, b in [
        (normal[1:], normal[:-1]),
        (normal[:, 1:], normal[:, :-1]),
        (normal, other_seed),
        (normal, other_purpose),
    ]:
        correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(a.numel())
