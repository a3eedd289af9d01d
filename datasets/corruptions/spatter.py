"""Spatter, drops of water or mud on the lens: its draws and its effect; the constants are in ``recipes.py``.

Water is shaded by the distance to the drops' edges. The published code finds edges and distances with OpenCV; here
the same integer arithmetic runs on a batch.
"""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from tta.datasets.corruptions import draws as random
from tta.datasets.corruptions import pixels
from tta.datasets.corruptions.draws import Draws, Keys, Setting, Size
from tta.datasets.corruptions.pixels import to_uint8, unit

_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
_MUD = (63 / 255, 42 / 255, 20 / 255)
_WEAK, _STRONG = 50, 150  # minimum gradient of all pixels of an edge, and of at least one of them
_ONE = 2**16  # a pixel: distances are integers, in 1 / 65536 pixel
_ACROSS, _DIAGONAL, _KNIGHT = _ONE, round(1.4 * _ONE), round(2.1969 * _ONE)  # lengths of the steps
_FAR = 20 * _ONE  # maximum distance
_EMBOSS = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))


def draw_layer(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {"layer": random.normal(keys("layer"), size)}


def spatter(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    mean, std, sigma, threshold, strength, kind = setting
    layer = pixels.gaussian(draws["layer"].double() * std + mean, sigma, pixels.nearest)
    return (_water, _mud)[kind](unit(images), layer.masked_fill(layer < threshold, 0), threshold, strength)


def _water(x: Tensor, layer: Tensor, threshold: float, strength: float) -> Tensor:
    liquid = to_uint8(layer).int()
    shade = liquid * _shading(_distance(_edges(liquid)))
    shade = shade / shade.amax((1, 2), keepdim=True).clamp(min=1) * strength
    return x + shade[:, None] * x.new_tensor(_WATER)[:, None, None]


def _mud(x: Tensor, layer: Tensor, threshold: float, sigma: float) -> Tensor:
    cover = pixels.gaussian((layer > threshold).double(), sigma, pixels.nearest)
    cover = cover.masked_fill(cover < 0.8, 0).to(x.dtype)[:, None]
    return x * (1 - cover) + cover * x.new_tensor(_MUD)[:, None, None]


def _edges(levels: Tensor) -> Tensor:
    """Canny's edges of grey levels, int32 (n, h, w) -> bool: ridges of the gradient with at least one strong pixel.

    Canny, "A Computational Approach to Edge Detection", IEEE TPAMI 1986; gradients by Sobel's filter, with size
    |dx| + |dy| as in OpenCV.
    """
    height, width = levels.shape[1:]
    around = pixels.padded(levels, 1, pixels.nearest)
    rows = around[:, :-2] + 2 * around[:, 1:-1] + around[:, 2:]
    columns = around[..., :-2] + 2 * around[..., 1:-1] + around[..., 2:]
    dx, dy = rows[..., 2:] - rows[..., :-2], columns[:, 2:] - columns[:, :-2]
    size = dx.abs() + dy.abs()
    beside = pad(size, (1, 1, 1, 1))

    def ridge(down: int, right: int) -> Tensor:
        before = beside[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        after = beside[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        # Of two equal pixels side by side the first is the ridge; of two equal diagonal ones neither is.
        return (size > before) & ((size > after) if down and right else (size >= after))

    tangent = 13573  # tan 22.5 degrees, times 2^15
    flat = (dy.abs() << 15) < dx.abs() * tangent
    steep = (dy.abs() << 15) > dx.abs() * (tangent + 2**16)  # tan 67.5 = tan 22.5 + 2
    diagonal = torch.where((dx ^ dy) < 0, ridge(1, -1), ridge(1, 1))
    weak = (size > _WEAK) & torch.where(flat, ridge(0, 1), torch.where(steep, ridge(1, 0), diagonal))
    edges = weak & (size > _STRONG)
    while not torch.equal(further := weak & (max_pool2d(edges.float(), 3, 1, 1) > 0), edges):
        edges = further
    return edges


def _distance(edges: Tensor) -> Tensor:
    """Distance to the nearest edge pixel, in 1 / 65536 pixel, at most 20 pixels: bool (n, h, w) -> int32.

    Borgefors, "Distance transformations in digital images", CVGIP 1986, with the 5 x 5 mask: one sweep from the first
    pixel to the last, one back.
    """
    distance = torch.full_like(edges, _FAR, dtype=torch.int32).masked_fill(edges, 0)
    for _ in range(2):
        distance = _sweep(distance).flip((1, 2))
    return distance


def _sweep(distance: Tensor) -> Tensor:
    count, height, width = distance.shape
    ramp = torch.arange(width, dtype=torch.int32, device=distance.device) * _ACROSS
    above = distance.new_tensor([_KNIGHT, _DIAGONAL, _ACROSS, _DIAGONAL, _KNIGHT])
    further_above = distance.new_tensor([_KNIGHT, _FAR, _KNIGHT])
    # Two rows above the image and two columns on each side have the maximum distance.
    out = distance.new_full((count, height + 2, width + 4), _FAR)
    for row in range(height):
        best = torch.minimum(
            (out[:, row + 1].unfold(1, 5, 1) + above).amin(2),
            (out[:, row, 1:-1].unfold(1, 3, 1) + further_above).amin(2),
        )
        best = torch.minimum(best, distance[:, row])
        out[:, row + 2, 2:-2] = (best - ramp).cummin(1).values + ramp  # any number of steps to the right
    return out[:, 2:, 2:-2]


def _shading(distance: Tensor) -> Tensor:
    """Light and shadow on the drops from the distance to their edges: int32 (n, h, w) -> (n, h, w) in 0 .. 255."""
    flattened = _equalised(_sum_3x3(distance) // (9 * _ONE))
    embossed = _sum_3x3(flattened, _EMBOSS).clamp(0, 255)
    return (2 * _sum_3x3(embossed) + 9) // 18  # the mean, rounded


def _sum_3x3(x: Tensor, weights: tuple[tuple[int, ...], ...] = ((1, 1, 1),) * 3) -> Tensor:
    height, width = x.shape[1:]
    around = pixels.padded(x, 1, pixels.mirror_101)
    terms = (
        around[:, r : r + height, c : c + width] * weights[r][c] for r in range(3) for c in range(3) if weights[r][c]
    )
    return sum(terms, torch.zeros_like(x))


def _equalised(levels: Tensor) -> Tensor:
    """Histogram equalisation of each image, levels 0 .. 255 -> 0 .. 255; an image of one level is not changed."""
    flat = levels.flatten(1).long()
    histogram = torch.zeros(len(flat), 256, dtype=torch.int32, device=flat.device)
    histogram.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
    lowest = flat.amin(1, keepdim=True)
    above = flat.shape[1] - histogram.gather(1, lowest)  # pixels above the lowest level
    passed = histogram.cumsum(1) - histogram.gather(1, lowest)
    table = (passed * (255 / above.clamp(min=1).float())).round().int()
    table = torch.where(above == 0, lowest.int(), table)
    return table.gather(1, flat).reshape(levels.shape)
