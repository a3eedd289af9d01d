"""Answers as they come in: ids of predictions, and whether they were right or which class it was."""

import re

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from tta.serve import bodies
from tta.serve.refusals import Refusal

MOST = 1000  # answers of a request
ID = r"^[0-7][0-9a-f]{15}$"


class Feedback(BaseModel):
    """Answers about predictions."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"ids": ["1f0c6a5be2d94471", "05e81c33a7b0f2d6"], "labels": [1, 0]}},
    )

    ids: list[StrictStr] = Field(
        min_length=1, max_length=MOST, description="Ids of predictions: 16 hexadecimal digits, as /predict gave them."
    )
    correct: list[StrictBool] | None = Field(None, description="For each whether the predicted class was right.")
    labels: list[StrictInt | StrictStr] | None = Field(None, description="For each its class, a number or a name.")

    def numbers(self) -> list[int]:
        """The ids as the adapter has them."""
        return [int(name, 16) for name in self.ids]


class Counted(BaseModel):
    """Counts of answers, by what was done with them."""

    taken: int = Field(description="Learned from, or noted by the guard.")
    repeated: int = Field(description="Said again what was known.")
    contradicting: int = Field(description="Said otherwise than the first answer, which counts.")
    expired: int = Field(description="About a prediction that is no longer kept.")
    unknown: int = Field(description="About an id that is not kept, or never was.")


class Questions(BaseModel):
    """Predictions that the adapter would like to be told about."""

    ids: list[str] = Field(description="The most wanted first; each is asked about once.")


def hexadecimal(number: int) -> str:
    """The id of a prediction as it is shown."""
    return f"{number:016x}"


async def read(request: Request, limit: int) -> Feedback:
    """The answers in a body of ``limit`` bytes at most.

    Raises:
        Refusal: it is longer, or not what it should be.
    """
    body = await bodies.read(request, limit, bodies.Room(limit))  # its own: only those with the token come here
    try:
        found = Feedback.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(422, f'The body is not {{"ids": [...], "labels": [...]}} ({where}: {first["msg"]}).') from None
    for number, name in enumerate(found.ids):
        if re.fullmatch(ID, name) is None:
            raise Refusal(422, f"ids.{number} is no id of a prediction: 16 hexadecimal digits, as /predict gave it.")
    return found
