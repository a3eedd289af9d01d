"""Pictures of a request: decoded within limits, fitted to the model as its weights expect."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tta.datasets.geometry import fitted
from tta.datasets.pictures import rgb, upright
from tta.serve.refusals import Refusal

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow reads many more, most of them by code that is rarely tried
# MPO: a JPEG of a phone with a second, smaller picture behind the one that viewers show.
STILL = "MPO"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24  # place of the byte with the bits a channel


def decode(bodies: Sequence[bytes], preprocessing: Mapping[str, Any], max_pixels: int) -> list[Tensor]:
    """The pictures of a request as the model takes them, each uint8 (3, height, width).

    Sizes are read from the heads of all files before the first pixel is decoded.

    Args:
        bodies: files of pictures: JPEG, PNG, WebP or BMP, 8 bits a channel.
        preprocessing: that of :class:`tta.models.ImageClassifier`.
        max_pixels: of all together.

    Raises:
        Refusal: one of them cannot be used; the sentence says which and why.
    """
    left = max_pixels
    for number, body in enumerate(bodies):
        with _named(number, len(bodies)):
            left -= _pixels(body, left, max_pixels)
    images = []
    for number, body in enumerate(bodies):
        with _named(number, len(bodies)):
            images.append(_decoded(body, preprocessing))
    return images


@contextmanager
def _named(number: int, of: int) -> Iterator[None]:
    """Within this context a refusal names the picture, if there are several, and any other error becomes one."""
    place = f"Picture {number + 1} of {of}" if of > 1 else "The picture"
    try:
        yield
    except Refusal as refusal:
        raise Refusal(refusal.status, f"{place} {refusal.sentence}") from None
    except Exception as error:  # a broken PNG is a SyntaxError of Pillow, and there are more
        reason = str(error).partition(" <")[0] or type(error).__name__  # Pillow names its own file object
        raise Refusal(422, f"{place} cannot be decoded: {reason}.") from None


def _opened(body: bytes) -> Image.Image:
    """A picture whose head alone was read."""
    try:
        return Image.open(io.BytesIO(body), formats=FORMATS)
    except UnidentifiedImageError:
        raise Refusal(415, f"is none that can be read: send {', '.join(FORMATS)}, 8 bits a channel.") from None
    except Image.DecompressionBombError:
        raise Refusal(413, "has too many pixels: it looks like a decompression bomb.") from None


def _pixels(body: bytes, left: int, limit: int) -> int:
    """The number of pixels that a head announces; refuses what is not served."""
    with _opened(body) as picture:
        width, height = picture.size
        if width * height > left:
            raise Refusal(413, f"has {width} x {height} pixels; a request may have {limit} in all.")
        if picture.format != STILL and getattr(picture, "is_animated", False):
            raise Refusal(415, "is animated: send one frame.")
        # Pillow gives 16 bits of RGB as 8, silently.
        if body.startswith(PNG_HEAD) and body[PNG_DEPTH : PNG_DEPTH + 1] == b"\x10":
            raise Refusal(415, "has 16 bits a channel: scale it to 8, so that 255 is white.")
        if picture.mode not in MODES:
            raise Refusal(415, f"is of mode {picture.mode}: convert it to RGB, 8 bits a channel.")
        return int(width * height)


def _decoded(body: bytes, preprocessing: Mapping[str, Any]) -> Tensor:
    with _opened(body) as picture:
        picture.load()
        return fitted(rgb(upright(picture)), preprocessing)
