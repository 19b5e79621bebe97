"""In place of the package ``nltk``, whose files are on the net: what a script calls of it."""

from __future__ import annotations


class data:  # the name of a module
    @staticmethod
    def find(_: str) -> None:
        """The files are there."""


def sent_tokenize(text: str) -> list[str]:
    return text.split(". ")
