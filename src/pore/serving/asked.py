"""What a visitor of the page asks: the request that its form sends, read or refused in words."""

from __future__ import annotations

from dataclasses import dataclass

from pore.errors import InputError
from pore.methods.settings import read_budget
from pore.serving.requests import Limits, RequestError


@dataclass(frozen=True)
class Asked:
    """A question about a picture, and how to prune.

    Attributes:
        image: The picture, a data URL.
        question: The question.
        method: Name of the method.
        keep: Visual tokens to keep of the picture (int), or the fraction (float).
        layer: K, the first pruned layer; None for the method's usual one.
        correction: Name of the correction, as the page offers it.
    """

    image: str
    question: str
    method: str
    keep: int | float
    layer: int | None
    correction: str

    @classmethod
    def read(cls, data: bytes, limits: Limits) -> Asked:
        """Read a request.

        Args:
            data: Its body: a JSON object of texts by the names of the attributes; an empty `layer`
                is the usual one.
            limits: How long it may be.

        Returns:
            What it asks.

        Raises:
            RequestError: It is no such request, or lacks something; the message says what.
        """
        body = limits.read_json(data)
        names = list(cls.__dataclass_fields__)
        if (
            not isinstance(body, dict)
            or set(body) != set(names)
            or not all(isinstance(value, str) for value in body.values())
        ):
            raise RequestError(f"A request is a JSON object with the texts {', '.join(names)}.")
        if not body["image"]:
            raise RequestError("There is no picture; choose one, or drop it on the page.")
        if not body["image"].startswith("data:"):
            raise RequestError("The picture must come with the question; choose or drop a file.")
        if not (question := body["question"].strip()):
            raise RequestError("There is no question; ask something about the picture.")
        limits.check_text(len(question))
        try:
            keep = read_budget(body["keep"].strip())
        except InputError as error:
            raise RequestError(f"Budget: {error}") from error
        layer = _layer(body["layer"].strip())
        return cls(body["image"], question, body["method"], keep, layer, body["correction"])


def _layer(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise RequestError(
            f"K is the number of a decoder layer, counted from 0, not {text[:80]!r}; leave it "
            "empty for the method's usual one."
        )
    return int(text)
