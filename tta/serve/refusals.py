"""Refusals: a request that is answered with a sentence in place of a prediction."""


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: of HTTP, 4xx where the client should do something else, 5xx where the server cannot.
        sentence: the reason, and what would work.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence
