"""Pictures sent to the server: prepared as the weights say, and refused where they cannot be read."""

import base64

import pytest
import torch
from PIL import Image
from torch import nn

from served import IMAGES, ask, file_of, metrics_of, serving_of
from tta.models import ImageClassifier
from tta.serve.pictures import decode
from tta.serve.refusals import Refusal


def test_pictures_are_resized_and_cropped_as_the_weights_say():
    import torchvision

    transforms = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.transforms()
    model = ImageClassifier(
        nn.Flatten(), transforms.mean, transforms.std, "x", (224, 224), interpolation="bilinear",
        resize=transforms.resize_size[0], crop="center",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 250, 330), dtype=torch.uint8, generator=generator)
    (image,) = decode([file_of(pixels)], model.preprocessing, 10**6)
    expected = transforms(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    torch.testing.assert_close((image[None] / 255 - model.mean)[0] / model.std[0], expected)


def test_pictures_are_turned_upright_and_made_rgb():
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (40, 20), "red")
    (image,) = decode([file_of(wide, "JPEG", exif=exif)], {}, 10**6)
    assert image.shape == (3, 40, 20)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        (image,) = decode([file_of(Image.new(mode, (8, 8)))], {}, 10**6)
        assert image.shape == (3, 8, 8)


def test_a_phones_jpeg_with_a_second_picture_is_read():
    body = file_of(Image.new("RGB", (16, 16), "blue"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    (image,) = decode([body], {}, 10**6)
    assert image.shape == (3, 16, 16)
    assert image[2].float().mean() > 200


def png_of_size(width, height):
    """The head of a PNG that announces this size, and little else."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def deep_png():
    """A PNG with 16 bits a channel of RGB, which Pillow would read as 8."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def moving(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


BAD_PICTURES = {
    "text": (b"hello", 415, "none that can be read"),
    "page": (b"<html><img src=x></html>", 415, "none that can be read"),
    "gif": (moving("GIF"), 415, "none that can be read"),
    "tiff": (file_of(Image.new("RGB", (8, 8)), "TIFF"), 415, "none that can be read"),
    "pdf": (file_of(Image.new("RGB", (8, 8)), "PDF"), 415, "none that can be read"),
    "moving png": (moving("PNG"), 415, "animated"),
    "moving webp": (moving("WEBP"), 415, "animated"),
    "cmyk": (file_of(Image.new("CMYK", (8, 8)), "JPEG"), 415, "mode CMYK"),
    "16-bit grey": (file_of(Image.new("I;16", (8, 8))), 415, "16 bits"),
    "16-bit rgb": (deep_png(), 415, "16 bits"),
    "cut png": (file_of(IMAGES[0])[:-60], 422, "cannot be decoded"),
    "cut jpeg": (file_of(IMAGES[0], "JPEG")[:300], 422, "cannot be decoded"),
    "bomb": (png_of_size(50_000, 50_000), 413, "pixels"),
    "large": (png_of_size(8_000, 8_000), 413, "8000 x 8000 pixels"),
    "thread": (file_of(Image.new("RGB", (3_000, 1))), 422, "3000 x 1 pixels"),
    "nothing in it": (png_of_size(64, 64), 422, "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused_and_never_reaches_the_model(refusing, name):
    body, code, sentence = BAD_PICTURES[name]
    alone = refusing.post("/predict", content=body, headers={"Content-Type": "image/png"})
    assert (alone.status_code, sentence in alone.json()["detail"]) == (code, True), alone.text
    files = [("images", ("good.png", file_of(IMAGES[0]))), ("images", ("bad.png", body))]
    among = refusing.post("/predict", files=files)
    assert among.status_code == code
    assert among.json()["detail"].startswith("Picture 2 of 2 ")
    assert metrics_of(refusing)["tta_images_total"] == 0


def test_pixels_are_counted_over_all_pictures_of_a_request(digits_cnn):
    with serving_of(digits_cnn, settings={"max_pixels": 3 * 32 * 32}) as client:
        assert len(ask(client, IMAGES[:3])) == 3
        texts = [base64.b64encode(file_of(image)).decode() for image in IMAGES[:4]]
        answer = client.post("/predict", json={"images": texts})
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith("Picture 4 of 4 has 32 x 32 pixels; a request may have 3072")


def test_refusals_have_a_status():
    with pytest.raises(Refusal, match="none that can be read"):
        decode([b"x"], {}, 10)
