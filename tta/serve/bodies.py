"""Bodies of requests: read within limits, and taken apart into the files of pictures that they hold."""

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, Field, ValidationError

from tta.serve.refusals import Refusal
from tta.serve.settings import ServeSettings

KINDS = "a picture (image/...), multipart/form-data, or application/json with base64"


class Base64Images(BaseModel):
    """Pictures as text."""

    images: list[Annotated[str, Field(min_length=1, json_schema_extra={"contentEncoding": "base64"})]] = Field(
        min_length=1, description="Files of pictures, each in base64; a data: URL works too."
    )


class Room:
    """Memory for the bodies that are arriving: ``limit`` bytes for all of them together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0


async def read(request: Request, limit: int, room: Room) -> bytes:
    """The body of a request, of ``limit`` bytes at most.

    Raises:
        Refusal: it is longer, by its head or by what arrives, or empty; or there is no room.
    """
    refusal = Refusal(413, f"The body is longer than {limit} bytes: send fewer or smaller pictures.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise refusal
    chunks, length = [], 0
    try:
        async for chunk in request.stream():
            length += len(chunk)
            room.taken += len(chunk)
            if length > limit:
                raise refusal
            if room.taken > room.limit:
                raise Refusal(429, "Too many bodies are arriving: ask again in a second.")
            chunks.append(chunk)
    finally:
        room.taken -= length
    if not length:
        raise Refusal(400, f"The body is empty: send {KINDS}.")
    return b"".join(chunks)


async def pictures(request: Request, body: bytes, settings: ServeSettings) -> list[bytes]:
    """The files in a body, by its content type.

    Raises:
        Refusal: another type, a body that is not what it says, no picture, or too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        found = _of_json(body, settings.max_images)
    elif kind == "multipart/form-data":
        found = await _of_form(request, body, settings.max_images)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        found = [body]
    else:
        raise Refusal(415, f"The content type '{kind[:80]}' is not served: send {KINDS}.")
    if not found:
        raise Refusal(400, "The request holds no picture.")
    _check_number(len(found), settings.max_images)
    return found


def _check_number(number: int, limit: int) -> None:
    if number > limit:
        raise Refusal(413, f"The request holds {number} pictures; {limit} are allowed.")


def _of_json(body: bytes, limit: int) -> list[bytes]:
    try:
        texts = Base64Images.model_validate_json(body).images
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise Refusal(400, f'The body is not {{"images": ["base64", ...]}} ({reason}).') from None
    _check_number(len(texts), limit)
    return [_of_base64(number, text) for number, text in enumerate(texts)]


def _of_base64(number: int, text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"images.{number} is not base64.") from None


async def _of_form(request: Request, body: bytes, limit: int) -> list[bytes]:
    try:
        form = await Request(request.scope, _replay(body)).form(max_files=limit, max_fields=limit)
    except Exception as error:  # an HTTPException with a sentence, or an error of the parser below
        raise Refusal(400, f"The form cannot be read: {getattr(error, 'detail', type(error).__name__)}") from None
    try:
        parts = [part for _, part in form.multi_items()]
        if any(isinstance(part, str) for part in parts):
            raise Refusal(400, "The form holds a field that is no file: send each picture as a file, with a filename.")
        return [await part.read() for part in parts if not isinstance(part, str)]
    finally:
        await form.close()


def _replay(body: bytes) -> Callable[[], Awaitable[dict[str, Any]]]:
    """A source of messages, as of ASGI, that gives a body already read."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
