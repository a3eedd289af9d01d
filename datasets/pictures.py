"""Pictures as they come, from files or datasets of any user: opened if they are files at all, turned upright, of 8 bits."""

import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Formats that Pillow reads as whole numbers ("I") only where a file has 16 bits, scaled to all of them.
_OF_16_BITS = ("PNG", "PPM")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read(file: Path, *, exif: bool) -> Image.Image:
    """The picture of a file, RGB of 8 bits a channel.

    Args:
        file: of any format and mode that Pillow reads; grey levels of 16 bits or floating point are scaled, see :func:`rgb`.
        exif: turn it as its EXIF orientation says, as every viewer does.

    Raises:
        FileNotFoundError: there is no such file, or it is a link to one that there is not.
        ValueError: anything else for which it cannot be used, in words: no plain file (it is not even opened: a pipe would
            wait for ever), not to be read, no picture, a broken one, or one of too many pixels (a decompression bomb).
    """
    check_plain(file)
    try:
        with file.open("rb") as opened, Image.open(opened) as picture:
            return rgb(upright(picture) if exif else picture)
    except Exception as error:
        # A broken PNG is a SyntaxError of Pillow, a bomb is of a class of its own, and there are more.
        reason = str(error).partition(" <")[0]  # Pillow names its own file object
        raise ValueError(reason or type(error).__name__) from None


def check_plain(file: Path) -> os.stat_result:
    """Status of a plain file, which is not opened.

    Raises:
        FileNotFoundError, ValueError: as :func:`read`.
    """
    try:
        known = file.stat()
    except FileNotFoundError:
        if file.is_symlink():
            raise FileNotFoundError(f"'{file}' is a link to '{os.readlink(file)}', which does not exist.") from None
        raise FileNotFoundError(f"There is no '{file}' (any more).") from None
    except OSError as error:  # a link to itself, or a folder that may not be entered
        raise ValueError(error.strerror or str(error)) from None
    if not stat.S_ISREG(known.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(known.st_mode)), "something else")
        raise ValueError(f"it is {kind}, not a file")
    return known


def orientation(picture: Image.Image) -> int:
    """The turn that a picture carries in its EXIF: 1 is upright, 2 to 8 are turned or mirrored; 1 where nothing is said."""
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata that cannot be parsed; the picture may still be good
        return 1
    return found if found in range(2, 9) else 1


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says, as every viewer does."""
    return ImageOps.exif_transpose(picture) if orientation(picture) != 1 else picture


def carries_turn(file: Path) -> bool:
    """Whether a file is a picture with an EXIF turn; reads its head only. False for one that cannot be used."""
    try:
        check_plain(file)
        with file.open("rb") as opened, Image.open(opened) as picture:
            return orientation(picture) != 1
    except Exception:  # reading the picture says what is wrong with it
        return False


def rgb(picture: Any) -> Image.Image:
    """A PIL picture of any mode as RGB of 8 bits: a level keeps its place between black and white.

    16 bits: 65535 becomes 255; a warning where nothing is above 4095, as 12 bits in a file of 16 look. Floating point in [0, 1]: 1 becomes 255. 32-bit whole numbers up to 255 are 8 bits already.
    Pillow's own conversion would clip all of these at 255.

    Raises:
        ValueError: whole or floating-point numbers beyond, whose white nobody knows, or a mode without colours.
    """
    if picture.mode.startswith("I;16"):
        return _grey(_of_16_bits(np.asarray(picture)))
    if picture.mode == "I":
        return _grey(_whole(np.asarray(picture), picture.format))
    if picture.mode == "F":
        levels = np.asarray(picture, dtype=np.float64)
        if not (levels.min() >= 0 and levels.max() <= 1):  # NaN is neither
            raise ValueError(
                f"its levels are floating-point numbers from {levels.min():g} to {levels.max():g}, so that nobody knows "
                "which is white: scale them to [0, 1], or save it in 8 or 16 bits"
            )
        return _grey(levels)
    converted: Image.Image = picture.convert("RGB")
    return converted


def _whole(levels: Any, made: str | None) -> Any:
    """Levels in [0, 1] of whole numbers in a picture of this format."""
    low, high = int(levels.min()), int(levels.max())
    if made in _OF_16_BITS and low >= 0:
        return _of_16_bits(levels)
    if low < 0 or high > 255:
        raise ValueError(
            f"its levels are 32-bit whole numbers from {low} to {high}, so that nobody knows which is white: scale them to "
            "0 to 255, or save it in 16 bits"
        )
    return levels / 255


def _of_16_bits(levels: Any) -> Any:
    if 0 < levels.max() < 2**12:  # always the same words, so that they are shown once
        warnings.warn(
            "A 16-bit picture has no level above 4095, a sixteenth of white, and is taken to be that dark. If the camera or "
            "scanner gives 12 bits or fewer, scale its levels to 16 bits.",
            stacklevel=4,
        )
    return levels / 65535


def _grey(levels: Any) -> Image.Image:
    return Image.fromarray((levels * 255).round().astype(np.uint8)).convert("RGB")
