"""The corruptions: what they promise, and each against a plain restatement of the published code, image by image."""

import colorsys
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor
from torchvision.io import write_png

from tta.datasets import corruptions, draws, frost
from tta.datasets.corruptions import CORRUPTIONS, apply, corrupt, draw

# torchvision announces the move of its codecs to TorchCodec, which the oldest supported release does not know
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

WITHOUT_DRAWS = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


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


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (24, 41), (20, 300)])
def test_gives_images_of_the_same_shape_and_type_and_leaves_the_given_ones_alone(
    name: str, size: tuple[int, int]
) -> None:
    images = pictures(3, *size)
    given = images.clone()
    damaged = corrupt(images, name)
    assert damaged.shape == images.shape
    assert damaged.dtype == torch.uint8
    assert not torch.equal(damaged, images)
    assert torch.equal(images, given)
    assert corrupt(images[:0], name).shape == (0, 3, *size)


@pytest.mark.parametrize("name", CORRUPTIONS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_an_image_is_damaged_alike_in_every_batch(name: str, data: st.DataObject) -> None:
    images, index = pictures(6), torch.tensor([3, 1, 4, 1_000_000, 5, 9])
    order = torch.tensor(data.draw(st.permutations(range(6))))
    cut = data.draw(st.integers(1, 5))
    severity, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(-(2**70), 2**70))
    whole = corrupt(images, name, severity=severity, seed=seed, index=index)
    parts = [corrupt(images[o], name, severity=severity, seed=seed, index=index[o]) for o in order.split(cut)]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_working_in_parts_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(5)
    whole = corrupt(images, name)
    monkeypatch.setattr(corruptions, "_VALUES_AT_ONCE", 2 * images[0].numel())
    assert torch.equal(corrupt(images, name), whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
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


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_moves_images_further(name: str) -> None:
    images = pictures(64, detail=10)
    distances = [
        (corrupt(images, name, severity=severity).float() - images).abs().mean().item() for severity in range(1, 6)
    ]
    if name in {"glass_blur", "motion_blur", "frost", "elastic_transform"}:
        # The published constants do not order these: glass blur's fifth severity smooths more than its fourth and so
        # undoes more, motion blur's third and fourth have the same sigma, frost takes away more of the image's own
        # light as it adds its own, and the elastic transform's affine jitter shrinks while its displacements grow.
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


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
def test_a_flat_image_stays_flat(name: str) -> None:
    images = torch.arange(0, 256, 5, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32)
    assert torch.equal(corrupt(images, name), images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupt_is_apply_after_draw(name: str) -> None:
    images, index = pictures(3), torch.tensor([7, 5, 6])
    drawn = draw(name, index, severity=3, seed=11, size=(32, 32))
    assert bool(drawn) == (name not in WITHOUT_DRAWS)
    assert all(len(numbers) == 3 for numbers in drawn.values())
    assert torch.equal(apply(name, images, drawn, severity=3), corrupt(images, name, severity=3, seed=11, index=index))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_result_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = pictures(16)
    damaged = corrupt(images.cuda(), name)
    assert damaged.device.type == "cuda"
    assert (damaged.cpu().int() - corrupt(images, name).int()).abs().max() <= 1


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    images = pictures(2)
    with pytest.raises(ValueError, match=r"No corruption 'fogg'\. Did you mean 'fog'\?.*gaussian_noise"):
        corrupt(images, "fogg")
    for severity in (0, 6, 2.5, "5"):
        with pytest.raises(ValueError, match=r"severity is 1, 2, 3, 4 or 5; got"):
            corrupt(images, "fog", severity=severity)  # type: ignore[arg-type]
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
    assert corrupt(black, "frost", frost_photographs=tmp_path).unique().tolist() == [45]  # .45 of 100
    write_png(torch.full((3, 200, 400), 200, dtype=torch.uint8), str(tmp_path / "a.png"))
    first = {"picture": torch.tensor([0.0, 0.9]), "top": torch.rand(2), "left": torch.rand(2)}
    sorted_by_name = apply("frost", black[:2], first, severity=5, frost_photographs=tmp_path)
    assert sorted_by_name[:, 0, 0, 0].tolist() == [90, 45]
    write_png(torch.zeros(3, 100, 100, dtype=torch.uint8), str(tmp_path / "c.png"))
    with pytest.raises(ValueError, match=r"at least as large as the images, 32 x 32; number 2 has 20 x 20"):
        corrupt(black, "frost", frost_photographs=tmp_path)


def test_the_texture_has_the_statistics_of_frost() -> None:
    textures = torch.stack(frost.textures()).float() / 255
    assert 0.42 < textures.mean() < 0.48
    assert 0.16 < textures.std() < 0.24
    assert (textures[:, 2].mean((1, 2)) > textures[:, 0].mean((1, 2))).all()  # cool
    assert textures.flatten(1).std(0).mean() > 0.1  # five different ones
    assert textures.median() < textures.mean()  # bright crystals over dark ground


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


# --- the published code, image by image ------------------------------------------------------------------------------
# x: (32, 32, 3) float64 in [0, 255]; d: the image's draws; returns grey levels before clipping and truncation.

NOISE = [0.04, 0.06, 0.08, 0.09, 0.10]
PHOTONS = [500, 250, 100, 75, 50]
IMPULSES = [0.01, 0.02, 0.03, 0.05, 0.07]
DISKS = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]
GLASS = [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)]
MOTION = [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]
ZOOM = [1.06, 1.11, 1.16, 1.21, 1.26]
SNOW = [
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
]
FROST = [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)]
FOG = [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]
BRIGHTNESS = [0.05, 0.1, 0.15, 0.2, 0.3]
CONTRAST = [0.75, 0.5, 0.4, 0.3, 0.15]
ELASTIC = [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)]
PIXELS = [0.95, 0.9, 0.85, 0.75, 0.65]
QUALITY = [80, 65, 58, 50, 40]

Array = np.ndarray
Given = dict[str, np.ndarray]


def truncated(levels: Array) -> Array:
    return (levels + 1e-6).clip(0, 255).astype(np.uint8)  # 254.9999999 is 255 short of rounding errors


def gaussian_noise(x: Array, d: Given, severity: int) -> Array:
    return x + 255 * NOISE[severity - 1] * d["noise"].transpose(1, 2, 0)


def shot_noise(x: Array, d: Given, severity: int) -> Array:
    photons = PHOTONS[severity - 1]
    return 255 * stats.poisson.ppf(d["uniform"].transpose(1, 2, 0), x / 255 * photons).clip(0) / photons


def impulse_noise(x: Array, d: Given, severity: int) -> Array:
    fraction, uniform = IMPULSES[severity - 1], d["uniform"].transpose(1, 2, 0)
    return np.select([uniform < fraction / 2, uniform < fraction], [0, 255], x)


def defocus_blur(x: Array, d: Given, severity: int) -> Array:
    radius, sigma = DISKS[severity - 1]
    a, b = np.meshgrid(np.arange(-8, 9), np.arange(-8, 9))
    disk = (a**2 + b**2 <= radius**2).astype(float)
    alias = np.exp(-np.array([1, 0, 1]) / (2 * sigma**2))
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(alias, alias) / alias.sum() ** 2, mode="mirror")
    return np.stack([ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(3)], -1)


def gaussian(x: Array, sigma: float) -> Array:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)


def glass_blur(x: Array, d: Given, severity: int) -> Array:
    sigma, reach, passes = GLASS[severity - 1]
    x = truncated(gaussian(x, sigma))
    for i in range(passes):
        for h in range(32 - reach, reach, -1):
            for w in range(32 - reach, reach, -1):
                h2, w2 = h + int(d["rows"][i, h, w]), w + int(d["columns"][i, h, w])
                x[h, w], x[h2, w2] = x[h2, w2], x[h, w]
    return gaussian(x.astype(float), sigma)


def motion(x: Array, radius: int, sigma: float, angle: float) -> Array:
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    down = np.ceil(steps * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    right = np.ceil(steps * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    out = np.zeros_like(x)
    for h in range(x.shape[0]):
        for w in range(x.shape[1]):
            line = x[(h + down).clip(0, x.shape[0] - 1), (w + right).clip(0, x.shape[1] - 1)]
            out[h, w] = np.tensordot(weights / weights.sum(), line, 1)
    return out.round()


def motion_blur(x: Array, d: Given, severity: int) -> Array:
    return motion(x, *MOTION[severity - 1], float(d["angle"]))


def clipped_zoom(x: Array, factor: float) -> Array:
    crop = int(np.ceil(32 / factor))
    top = (32 - crop) // 2
    x = ndimage.zoom(x[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
    trim = (len(x) - 32) // 2
    return x[trim : trim + 32, trim : trim + 32]


def zoom_blur(x: Array, d: Given, severity: int) -> Array:
    factors = np.arange(1, ZOOM[severity - 1], 0.01)
    return (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x: Array, d: Given, severity: int) -> Array:
    mean, std, zoom, threshold, radius, sigma, keep = SNOW[severity - 1]
    layer = clipped_zoom((mean + std * d["layer"])[..., None], zoom)
    layer[layer < threshold] = 0
    layer = motion(np.uint8(layer.clip(0, 1) * 255).astype(float), radius, sigma, float(d["angle"])) / 255
    x = x / 255
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    x = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return 255 * (x + layer + np.rot90(layer, 2))


def frost_(x: Array, d: Given, severity: int) -> Array:
    keep, strength = FROST[severity - 1]
    picture = frost.textures()[int(d["picture"] * 5)].permute(1, 2, 0).numpy()
    top, left = (int(d[edge] * (256 - 32)) for edge in ("top", "left"))
    return keep * x + strength * picture[top : top + 32, left : left + 32]


def fog(x: Array, d: Given, severity: int) -> Array:
    strength, decay = FOG[severity - 1]
    side, wibble, step = 32, 100.0, 32
    heights = np.zeros((side, side))
    while step >= 2:
        half = step // 2
        squares = [(r, c) for r in range(half, side, step) for c in range(half, side, step)]
        diamonds = [(r, c) for r in range(0, side, half) for c in range(0, side, half) if (r + c) // half % 2]
        for points, around in (
            (squares, [(-half, -half), (-half, half), (half, -half), (half, half)]),
            (diamonds, [(-half, 0), (half, 0), (0, -half), (0, half)]),
        ):
            for r, c in points:
                mean = sum(heights[(r + a) % side, (c + b) % side] for a, b in around) / 4
                heights[r, c] = mean + wibble * (wibble * d["plasma"][r, c])
        step, wibble = half, wibble / decay
    plasma = (heights - heights.min()) / (heights.max() - heights.min())
    x = x / 255
    return 255 * (x + strength * plasma[..., None]) * x.max() / (x.max() + strength)


def brightness(x: Array, d: Given, severity: int) -> Array:
    out = np.empty_like(x)
    for at in np.ndindex(32, 32):
        hue, saturation, value = colorsys.rgb_to_hsv(*(x[at] / 255))
        out[at] = colorsys.hsv_to_rgb(hue, saturation, min(1, value + BRIGHTNESS[severity - 1]))
    return out * 255


def contrast(x: Array, d: Given, severity: int) -> Array:
    mean = x.mean((0, 1))
    return (x - mean) * CONTRAST[severity - 1] + mean


def elastic_transform(x: Array, d: Given, severity: int) -> Array:
    amplitude, sigma, jitter = (32 * c for c in ELASTIC[severity - 1])
    points = np.array([(26, 26), (26, 6), (6, 6)], float)
    there = np.c_[points + jitter * d["points"], np.ones(3)]
    back = np.linalg.solve(there, points)  # (x', y', 1) @ back = (x, y)
    rows, columns = np.mgrid[:32, :32].astype(float)
    source = np.stack([columns, rows, np.ones((32, 32))], -1) @ back
    x = sample(x, source[..., 1], source[..., 0], "mirror")
    down, right = (
        ndimage.gaussian_filter(d[axis].astype(float), sigma, mode="reflect", truncate=3) * amplitude
        for axis in ("rows", "columns")
    )
    return sample(x, rows + down, columns + right, "reflect")


def sample(x: Array, rows: Array, columns: Array, mode: str) -> Array:
    return np.stack([ndimage.map_coordinates(x[..., c], [rows, columns], order=1, mode=mode) for c in range(3)], -1)


def pixelate(x: Array, d: Given, severity: int) -> Array:
    small = int(32 * PIXELS[severity - 1])
    image = Image.fromarray(x.astype(np.uint8)).resize((small, small), Image.Resampling.BOX)
    return np.array(image.resize((32, 32), Image.Resampling.BOX), dtype=float)


def jpeg_compression(x: Array, d: Given, severity: int) -> Array:
    file = io.BytesIO()
    Image.fromarray(x.astype(np.uint8)).save(file, "JPEG", quality=QUALITY[severity - 1])
    return np.array(Image.open(file), dtype=float)


PUBLISHED = {name: globals()["frost_" if name == "frost" else name] for name in CORRUPTIONS}


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_equals_the_published_code_given_the_same_draws(name: str, severity: int) -> None:
    images = pictures(3)
    drawn = draw(name, torch.arange(3), severity=severity, seed=5, size=(32, 32))
    ours = apply(name, images, drawn, severity=severity)
    for number in range(3):
        x = images[number].permute(1, 2, 0).double().numpy()
        levels = PUBLISHED[name](x, {key: value[number].numpy() for key, value in drawn.items()}, severity)
        theirs = truncated(levels)
        difference = np.abs(ours[number].permute(1, 2, 0).numpy().astype(int) - theirs)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.005  # values at a whole grey level; not a systematic shift


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_blur_copies_in_the_published_order_also_when_copies_are_copied(reach: int) -> None:
    side, passes = 20, 2
    rng = np.random.default_rng(reach)
    images = torch.from_numpy(rng.integers(0, 256, (4, 3, side, side), dtype=np.uint8))
    rows, columns = rng.integers(-reach, reach, (2, 4, passes, side, side))
    given_draws = {"rows": torch.from_numpy(rows), "columns": torch.from_numpy(columns)}
    ours = corruptions._to_uint8(corruptions._glass_blur(images, given_draws, (0.05, reach, passes)))
    theirs = images.permute(0, 2, 3, 1).numpy().copy()
    for image, down, right in zip(theirs, rows, columns, strict=True):
        for i in range(passes):
            for h in range(side - reach, reach, -1):
                for w in range(side - reach, reach, -1):
                    image[h, w] = image[h + down[i, h, w], w + right[i, h, w]]
    assert torch.equal(ours, torch.from_numpy(theirs).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("height", "width", "small"), [(32, 32, 0.3), (45, 28, 0.65), (64, 64, 0.9)])
def test_box_resize_is_pillows(height: int, width: int, small: float) -> None:
    images = pictures(2, height, width)
    ours = corruptions._pixelate(images, {}, small)
    for image, mine in zip(images, ours, strict=True):
        there = Image.fromarray(image.permute(1, 2, 0).numpy())
        there = there.resize((int(width * small), int(height * small)), Image.Resampling.BOX)
        back = np.array(there.resize((width, height), Image.Resampling.BOX))
        assert np.array_equal(mine.permute(1, 2, 0).numpy(), back)
