"""Each corruption against a plain restatement of the published code: NumPy, SciPy and Pillow, image by image."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor

from tta.datasets.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, apply, blur, digital, draw, frost, pixels
from tta.datasets.corruptions import spatter as drops

# torchvision announces the move of its codecs to TorchCodec, which the oldest supported release does not know
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

CIFAR = {
    "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "shot_noise": [500, 250, 100, 75, 50],
    "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "zoom_blur": [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
    "snow": [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ],
    "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    "elastic_transform": [
        (0, 0, 0.08 * 32),
        (0.05 * 32, 0.2 * 32, 0.07 * 32),
        (0.08 * 32, 0.06 * 32, 0.06 * 32),
        (0.1 * 32, 0.04 * 32, 0.05 * 32),
        (0.1 * 32, 0.03 * 32, 0.03 * 32),
    ],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "jpeg_compression": [80, 65, 58, 50, 40],
    "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
    "spatter": [
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ],
    "saturate": [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
}
IMAGENET = {
    "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38],
    "shot_noise": [60, 25, 12, 5, 3],
    "impulse_noise": [0.03, 0.06, 0.09, 0.17, 0.27],
    "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    "zoom_blur": [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    "snow": [
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ],
    "frost": [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    "fog": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
    "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
    "elastic_transform": [
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    ],
    "pixelate": [0.6, 0.5, 0.4, 0.3, 0.25],
    "jpeg_compression": [25, 18, 15, 10, 7],
    "speckle_noise": [0.15, 0.2, 0.35, 0.45, 0.6],
    "gaussian_blur": [1, 2, 3, 4, 6],
    "spatter": [
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ],
    "saturate": [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
}
CONSTANTS = {"cifar": CIFAR, "imagenet": IMAGENET}

# --- the restatement: x is (side, side, 3) float64 in [0, 255], d the image's draws, c the constants -------------------
# Each returns grey levels before clipping and truncation.

Array = np.ndarray
Given = dict[str, np.ndarray]


def truncated(levels: Array) -> Array:
    return (levels + 1e-6).clip(0, 255).astype(np.uint8)  # 254.9999999 is 255 short of rounding errors


def gaussian_noise(x: Array, d: Given, c: float) -> Array:
    return x + 255 * c * d["noise"].transpose(1, 2, 0)


def shot_noise(x: Array, d: Given, c: float) -> Array:
    return 255 * stats.poisson.ppf(d["uniform"].transpose(1, 2, 0), x / 255 * c).clip(0) / c


def impulse_noise(x: Array, d: Given, c: float) -> Array:
    uniform = d["uniform"].transpose(1, 2, 0)
    return np.select([uniform < c / 2, uniform < c], [0, 255], x)


def defocus_blur(x: Array, d: Given, c: tuple) -> Array:
    radius, sigma = c
    half, soft = (8, 1) if radius <= 8 else (radius, 2)
    a, b = np.meshgrid(np.arange(-half, half + 1), np.arange(-half, half + 1))
    disk = (a**2 + b**2 <= radius**2).astype(float)
    alias = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * sigma**2))
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(alias, alias) / alias.sum() ** 2, mode="mirror")
    return np.stack([ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(3)], -1)


def gaussian(x: Array, sigma: float) -> Array:
    return ndimage.gaussian_filter(x, (sigma, sigma, *[0] * (x.ndim - 2)), mode="nearest", truncate=4)


def glass_blur(x: Array, d: Given, c: tuple) -> Array:
    sigma, reach, passes = c
    side = len(x)
    x = truncated(gaussian(x, sigma))
    for i in range(passes):
        for h in range(side - reach, reach, -1):
            for w in range(side - reach, reach, -1):
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
            out[h, w] = (weights / weights.sum()) @ line
    return out.round()


def motion_blur(x: Array, d: Given, c: tuple) -> Array:
    return motion(x, *c, float(d["angle"]))


def clipped_zoom(x: Array, factor: float) -> Array:
    side = len(x)
    crop = int(np.ceil(side / factor))
    top = (side - crop) // 2
    x = ndimage.zoom(x[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
    trim = (len(x) - side) // 2
    return x[trim : trim + side, trim : trim + side]


def zoom_blur(x: Array, d: Given, c: tuple) -> Array:
    factors = np.arange(1, *c)
    return (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x: Array, d: Given, c: tuple) -> Array:
    mean, std, zoom, threshold, radius, sigma, keep = c
    layer = clipped_zoom((mean + std * d["layer"])[..., None], zoom)
    layer[layer < threshold] = 0
    layer = motion(np.uint8(layer.clip(0, 1) * 255).astype(float), radius, sigma, float(d["angle"])) / 255
    x = x / 255
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    x = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return 255 * (x + layer + np.rot90(layer, 2))


def frost_(x: Array, d: Given, c: tuple, recipe: str) -> Array:
    side, room = len(x), {"cifar": 256, "imagenet": 512}[recipe] - len(x)
    picture = frost.textures(recipe)[int(d["picture"] * 5)].permute(1, 2, 0).numpy()
    top, left = (int(d[edge] * room) for edge in ("top", "left"))
    return c[0] * x + c[1] * picture[top : top + side, left : left + side]


def fog(x: Array, d: Given, c: tuple) -> Array:
    strength, decay = c
    side = len(d["plasma"])
    wibble, step = 100.0, side
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
    return 255 * (x + strength * plasma[: len(x), : len(x), None]) * x.max() / (x.max() + strength)


def in_hsv(x: Array, change) -> Array:
    out = np.empty_like(x)
    for at in np.ndindex(*x.shape[:2]):
        out[at] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(x[at] / 255))))
    return out * 255


def brightness(x: Array, d: Given, c: float) -> Array:
    return in_hsv(x, lambda hue, saturation, value: (hue, saturation, min(1, value + c)))


def saturate(x: Array, d: Given, c: tuple) -> Array:
    return in_hsv(x, lambda hue, saturation, value: (hue, min(1, saturation * c[0] + c[1]), value))


def contrast(x: Array, d: Given, c: float) -> Array:
    mean = x.mean((0, 1))
    return (x - mean) * c + mean


def elastic_transform(x: Array, d: Given, c: tuple) -> Array:
    amplitude, sigma, jitter = c
    side = len(x)
    middle, third = side // 2, side // 3
    points = np.array([(middle + third,) * 2, (middle + third, middle - third), (middle - third,) * 2], float)
    there = np.c_[points + jitter * d["points"], np.ones(3)]
    back = np.linalg.solve(there, points)  # (x', y', 1) @ back = (x, y)
    rows, columns = np.mgrid[:side, :side].astype(float)
    source = np.stack([columns, rows, np.ones((side, side))], -1) @ back
    x = sample(x, source[..., 1], source[..., 0], "mirror")
    down, right = (
        ndimage.gaussian_filter(d[axis].astype(float), sigma, mode="reflect", truncate=3) * amplitude
        for axis in ("rows", "columns")
    )
    return sample(x, rows + down, columns + right, "reflect")


def sample(x: Array, rows: Array, columns: Array, mode: str) -> Array:
    return np.stack([ndimage.map_coordinates(x[..., c], [rows, columns], order=1, mode=mode) for c in range(3)], -1)


def pixelate(x: Array, d: Given, c: float) -> Array:
    side = len(x)
    image = Image.fromarray(x.astype(np.uint8)).resize((int(side * c),) * 2, Image.Resampling.BOX)
    return np.array(image.resize((side, side), Image.Resampling.BOX), dtype=float)


def jpeg_compression(x: Array, d: Given, c: int) -> Array:
    file = io.BytesIO()
    Image.fromarray(x.astype(np.uint8)).save(file, "JPEG", quality=c)
    return np.array(Image.open(file), dtype=float)


def speckle_noise(x: Array, d: Given, c: float) -> Array:
    return x + x * c * d["noise"].transpose(1, 2, 0)


def gaussian_blur(x: Array, d: Given, c: float) -> Array:
    return gaussian(x, c)


def spatter(x: Array, d: Given, c: tuple) -> Array:
    mean, std, sigma, threshold, strength, kind = c
    liquid = gaussian(mean + std * d["layer"].astype(float), sigma)
    liquid[liquid < threshold] = 0
    if kind == 0:
        liquid = truncated(255 * liquid).astype(int)
        m = liquid * shading(edge_distance(canny(liquid)))
        return x + (strength * m / max(1, m.max()))[..., None] * [175, 238, 238]
    m = gaussian((liquid > threshold).astype(float), strength)
    m[m < 0.8] = 0
    return x * (1 - m[..., None]) + m[..., None] * [63, 42, 20]


def canny(image: Array, low: int = 50, high: int = 150) -> Array:
    """OpenCV's Canny(image, 50, 150): bool."""
    smooth, slope = np.array([1, 2, 1]), np.array([-1, 0, 1])
    dx = ndimage.correlate(image, np.outer(smooth, slope), mode="nearest")
    dy = ndimage.correlate(image, np.outer(slope, smooth), mode="nearest")
    size = np.pad(abs(dx) + abs(dy), 1)
    thin = np.zeros(image.shape, bool)
    for h, w in np.ndindex(image.shape):
        around, here = size[h : h + 3, w : w + 3], size[h + 1, w + 1]
        x, y = abs(dx[h, w]), abs(dy[h, w])
        if y < np.tan(np.pi / 8) * x:
            peak = here > around[1, 0] and here >= around[1, 2]
        elif y > np.tan(3 * np.pi / 8) * x:
            peak = here > around[0, 1] and here >= around[2, 1]
        elif dx[h, w] * dy[h, w] < 0:
            peak = here > around[0, 2] and here > around[2, 0]
        else:
            peak = here > around[0, 0] and here > around[2, 2]
        thin[h, w] = peak and here > low
    lines, _ = ndimage.label(thin, np.ones((3, 3)))
    strong = np.unique(lines[thin & (size[1:-1, 1:-1] > high)])
    return thin & np.isin(lines, strong)


def edge_distance(edges: Array) -> Array:
    """OpenCV's distanceTransform(DIST_L2, 5), cut off at 20: the shortest way of steps 1, 1.4 and 2.1969 long."""
    rows, columns = np.mgrid[: edges.shape[0], : edges.shape[1]]
    distance = np.full(edges.shape, 20 * 2**16)
    across, diagonal, knight = (round(length * 2**16) for length in (1, 1.4, 2.1969))
    for h, w in zip(*edges.nonzero(), strict=True):
        a, b = abs(rows - h), abs(columns - w)
        far, near = np.maximum(a, b), np.minimum(a, b)
        few = (far - 2 * near) * across + near * knight
        many = (far - near) * knight + (2 * near - far) * diagonal
        distance = np.minimum(distance, np.where(far >= 2 * near, few, many))
    return distance


def shading(distance: Array) -> Array:
    """blur, equalizeHist, filter2D, blur of OpenCV."""
    levels = ndimage.correlate(distance, np.ones((3, 3), int), mode="mirror") // (9 * 2**16)
    lowest = levels.min()
    above = (levels > lowest).sum()
    table = [((levels <= level) & (levels > lowest)).sum() for level in range(21)]
    if above:
        levels = np.array([round(255 / above * passed) for passed in table])[levels]
    emboss = np.array([(-2, -1, 0), (-1, 1, 1), (0, 1, 2)])
    levels = ndimage.correlate(levels, emboss, mode="mirror").clip(0, 255)
    return np.rint(ndimage.correlate(levels, np.ones((3, 3), int), mode="mirror") / 9)


# --- the comparison --------------------------------------------------------------------------------------------------


def pictures(count: int, height: int, width: int) -> Tensor:
    """Coloured gradients with some detail, uint8; corners are black, white and grey."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase = rng.uniform(0, 6, (count, 3, 1, 1))
    smooth = 128 + 90 * np.sin(5 * x + phase) * np.cos(4 * y - phase)
    image = (smooth + 40 * rng.uniform(-1, 1, smooth.shape)).clip(0, 255).astype(np.uint8)
    image[:, :, :5, :5] = 0
    image[:, :, -5:, -5:] = 255
    image[:, :, -5:, :5] = 99
    return torch.from_numpy(image)


def compare(name: str, severity: int, recipe: str, side: int, count: int) -> None:
    images = pictures(count, side, side)
    drawn = draw(name, torch.arange(count), severity=severity, seed=5, size=(side, side), recipe=recipe)
    ours = apply(name, images, drawn, severity=severity, recipe=recipe)
    constants = CONSTANTS[recipe][name][severity - 1]
    for number in range(count):
        x = images[number].permute(1, 2, 0).double().numpy()
        given = {key: value[number].numpy() for key, value in drawn.items()}
        levels = frost_(x, given, constants, recipe) if name == "frost" else globals()[name](x, given, constants)
        difference = np.abs(ours[number].permute(1, 2, 0).numpy().astype(int) - truncated(levels))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.005  # values at a whole grey level; not a systematic shift


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("recipe", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", CORRUPTIONS + VALIDATION_CORRUPTIONS)
def test_equals_the_published_code_given_the_same_draws(name: str, recipe: str, severity: int) -> None:
    compare(name, severity, recipe, side=32 if recipe == "cifar" else 48, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CORRUPTIONS + VALIDATION_CORRUPTIONS)
def test_equals_the_published_code_at_224_pixels(name: str, severity: int) -> None:
    compare(name, severity, "imagenet", side=224, count=1)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_blur_copies_in_the_published_order_also_when_copies_are_copied(reach: int) -> None:
    side, passes = 20, 2
    rng = np.random.default_rng(reach)
    images = torch.from_numpy(rng.integers(0, 256, (4, 3, side, side), dtype=np.uint8))
    rows, columns = rng.integers(-reach, reach, (2, 4, passes, side, side))
    given_draws = {"rows": torch.from_numpy(rows), "columns": torch.from_numpy(columns)}
    ours = pixels.to_uint8(blur.glass_blur(images, given_draws, (0.05, reach, passes)))
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
    ours = digital.pixelate(images, {}, small)
    for image, mine in zip(images, ours, strict=True):
        there = Image.fromarray(image.permute(1, 2, 0).numpy())
        there = there.resize((int(width * small), int(height * small)), Image.Resampling.BOX)
        back = np.array(there.resize((width, height), Image.Resampling.BOX))
        assert np.array_equal(mine.permute(1, 2, 0).numpy(), back)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 7.0, 30.0])
@pytest.mark.parametrize(("border", "mode"), [(pixels.nearest, "nearest"), (pixels.mirror, "reflect")])
def test_gaussian_is_scipys_also_where_the_kernel_is_longer_than_the_image(border, mode: str, sigma: float) -> None:
    x = torch.rand(2, 20, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = ndimage.gaussian_filter(x.numpy(), (0, sigma, sigma), mode=mode, truncate=4)
    assert np.abs(pixels.gaussian(x, sigma, border).numpy() - theirs).max() < 1e-12


# cv2.Canny(levels, 50, 150) of OpenCV 5.0 for a square of 9 x 9 pixels, two pixels of ground around it
OUTLINE = """
.............
...#######...
..#.......#..
.#........#..
.#........#..
.#........#..
.#........#..
.#........#..
.#........#..
.#........#..
..#########..
.............
............."""


def test_edges_are_opencvs() -> None:
    levels = torch.zeros(1, 40, 40, dtype=torch.int32)
    levels[:, 10:19, 10:19] = 100
    levels[:, 30:35, 30:35] = 10  # too faint
    edges = drops._edges(levels)[0]
    found = "".join("\n" + "".join("#" if edge else "." for edge in row) for row in edges[8:21, 8:21])
    assert found == OUTLINE
    assert edges.sum() == OUTLINE.count("#")
    assert np.array_equal(edges.numpy(), canny(levels[0].numpy()))


def test_distances_are_those_of_the_5_x_5_mask() -> None:
    edges = torch.zeros(1, 41, 41, dtype=torch.bool)
    edges[0, 20, 20] = True
    distance = drops._distance(edges)[0].double() / 2**16
    for (a, b), expected in {(0, 1): 1, (1, 1): 1.4, (1, 2): 2.1969, (3, 1): 3.1969, (0, 20): 20, (20, 20): 20}.items():
        for row, column in ((a, b), (b, a), (-a, b), (a, -b), (-b, -a)):
            assert distance[20 + row, 20 + column] == pytest.approx(expected, abs=1e-4)


def test_an_image_without_drops_stays_as_it_is() -> None:
    images = pictures(1, 32, 32)
    for severity in (1, 5):
        assert torch.equal(
            apply("spatter", images, {"layer": torch.full((1, 32, 32), -3.0)}, severity=severity), images
        )
