"""The layer layouts of Megatron-LM's ``--pipeline-model-parallel-layout``: one reader, one writer.

``Et*2|(t*2|)*34,t*3|tL``: E is the embedding, t a decoder layer, m a multi-token prediction layer,
L head and loss; ``|`` ends a virtual stage, ``x*n`` and ``(..)*n`` repeat, commas mean nothing.
Stage ``s`` is on rank ``s % pp``. What Megatron's own reader refuses is refused here (groups within
groups, a group without a number), blanks apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import LIMITS

# Letters of a whole layout: as many as the layers and stages that are possible.
MOST_LETTERS = LIMITS["num_layers"] + LIMITS["num_stages"]
_ITEM = re.compile(r"([EtmL|])(?:\*([0-9]+))?|[,\s]+")
_GROUP = re.compile(r"\(([,\s]*[EtmL|][^()]*)\)\*([0-9]+)")
_REMEDIES = {
    "(": "a group is written (..)*number, and Megatron reads no group in a group",
    ")": "a group is written (..)*number",
    "*": "put one letter or one group before it: t*2, (t*2|)*3",
}


@dataclass(frozen=True)
class LayerLayout:
    """What every virtual stage holds, in pipeline order.

    Attributes:
        stages: Letters of each: ``Ett``, ``tt``, empty, ``tmL``.
    """

    stages: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """Decoder layers of all stages."""
        return sum(stage.count("t") for stage in self.stages)

    @property
    def num_extra_layers(self) -> int:
        """Multi-token prediction layers of all stages."""
        return sum(stage.count("m") for stage in self.stages)

    def __str__(self) -> str:
        """Write the layout as short as Megatron reads it."""
        written = []
        *earlier, last = self.stages
        for stage, equal in groupby(earlier):
            number, text = len(list(equal)), f"{_written(stage)}|"
            repeated = f"({text})*{number}," if stage else f"|*{number},"
            written.append(repeated if number > 1 else text)
        return ("".join(written) + _written(last)).removesuffix(",")

    def check(self) -> None:
        """Refuse what Megatron does not train.

        Raises:
            PlanError: The embedding is not first, or not once; the loss not last, or not once; or
                a decoder layer is behind a multi-token prediction layer.
        """
        letters = "".join(self.stages)
        for letter, name, at_end in (("E", "embedding", 0), ("L", "loss", -1)):
            if letters.count(letter) != 1 or letters[at_end] != letter:
                where = "begin" if at_end == 0 else "end"
                raise PlanError(
                    f"layout {shortened_layout(str(self))!r} has {letters.count(letter)} times "
                    f"{letter} ({name}); it must {where} with the only one"
                )
        if "t" in letters.partition("m")[2]:
            raise PlanError(
                f"layout {shortened_layout(str(self))!r} has a decoder layer (t) behind a "
                "multi-token prediction layer (m); put m behind the last t"
            )


def parse_layout(text: str) -> LayerLayout:
    """Read a layout.

    Raises:
        PlanError: It is no layout, with the position and the remedy, or stands for more layers and
            stages than are possible.
    """
    found = ""
    for letters, times in _parts(text, 0, len(text)):
        if len(times) > 9 or len(found) + len(letters) * int(times) > MOST_LETTERS:
            raise PlanError(
                f"the layout stands for more than {MOST_LETTERS} layers and stages; lower its "
                "repeats"
            )
        found += letters * int(times)
    return LayerLayout(tuple(found.split("|")))


def _parts(text: str, at: int, end: int, *, inner: bool = False) -> Iterator[tuple[str, str]]:
    """Yield letters and how often they are meant, from one position to another."""
    while at < end:
        group = None if inner else _GROUP.match(text, at, end)
        item = _ITEM.match(text, at, end)
        if group is not None:
            own = _parts(text, group.start(1), group.end(1), inner=True)
            yield "".join(letter * min(int(n[:9]), MOST_LETTERS) for letter, n in own), group[2]
        elif item is not None and item[1]:
            yield item[1], item[2] or "1"
        elif item is None:
            remedy = _REMEDIES.get(text[at], "use E, t, m, L, |, *number and (..)*number")
            raise PlanError(
                f"layout: {shortened_layout(text[at:])!r} at position {at + 1} cannot be read; "
                f"{remedy}"
            )
        at = (group or item).end()  # type: ignore[union-attr]


def shortened_layout(text: str) -> str:
    """Return a layout, or the beginning of a long one, for messages."""
    return text if len(text) <= 60 else f"{text[:60]}..."


def _written(stage: str) -> str:
    """Write one stage: ``Et*5``."""
    runs = [(letter, len(list(equal))) for letter, equal in groupby(stage)]
    return "".join(letter if number == 1 else f"{letter}*{number}" for letter, number in runs)


# -- a layout and the blocks of a model ---------------------------------------------------------

EXTRA = "mtp."  # begins the names of the blocks of multi-token prediction


def letters_of(graph: BlockGraph) -> tuple[str, ...]:
    """Return the letter of every block: those before the first layer are E, behind the last L.

    Raises:
        PlanError: The model is no stack of layers between an embedding and a head.
    """
    kinds = [block.kind for block in graph.blocks]
    layers = [index for index, kind in enumerate(kinds) if kind == "layer"]
    if not layers:
        raise PlanError(
            f"{graph.model_class} has no blocks of kind layer; make the plan with --granularity "
            "layer"
        )
    found = []
    for index, block in enumerate(graph.blocks):
        if layers[0] < index < layers[-1] and block.kind != "layer":
            raise PlanError(
                f"block {block.name!r} ({block.kind}) is between the layers of "
                f"{graph.model_class}; layouts say embedding, layers, head and loss only"
            )
        if block.kind == "layer":
            found.append("m" if block.name.startswith(EXTRA) else "t")
        else:
            found.append("E" if index < layers[0] else "L")
    return tuple(found)


def layout_of(graph: BlockGraph, stages: Sequence[Sequence[str]]) -> LayerLayout:
    """Return the layout of the stages of a plan.

    Raises:
        PlanError: A layout cannot say it: the blocks of E, or of L, are in several stages.
    """
    letter_of = dict(zip(graph.block_index, letters_of(graph), strict=True))
    for letter, name in (("E", "embedding"), ("L", "head and loss")):
        own = [block for block, found in letter_of.items() if found == letter]
        homes = [n for n, stage in enumerate(stages) if any(b in own for b in stage)]
        if len(homes) > 1:
            raise PlanError(
                f"blocks {', '.join(own)} ({name}) are in stages {homes[0]} and {homes[-1]}; a "
                "layout has them in one: move them together"
            )
    found = []
    for stage in stages:
        letters = "".join(letter_of[block] for block in stage)
        found.append("E" * ("E" in letters) + letters.replace("E", "").replace("L", "")
                     + "L" * ("L" in letters))  # fmt: skip
    return LayerLayout(tuple(found))


def blocks_of(layout: LayerLayout, graph: BlockGraph) -> tuple[tuple[str, ...], ...]:
    """Return the blocks of every stage; an empty stage has none.

    Raises:
        PlanError: The layout is of another number of layers.
    """
    layout.check()
    letters = letters_of(graph)
    if layout.num_layers != letters.count("t"):
        raise PlanError(
            f"the layout has {layout.num_layers} decoder layers (t), {graph.model_class} has "
            f"{letters.count('t')}; write one t for each"
        )
    if layout.num_extra_layers != letters.count("m"):
        raise PlanError(
            f"the layout has {layout.num_extra_layers} multi-token prediction layers (m), the "
            f"graph {letters.count('m')}; give one m for each"
        )
    names = {letter: [block.name for block, found in zip(graph.blocks, letters, strict=True)
                      if found == letter] for letter in "EtmL"}  # fmt: skip
    found = []
    for stage in layout.stages:
        own: list[str] = []
        for letter in stage:
            number = 1 if letter in "tm" else len(names[letter])
            own += names[letter][:number]
            del names[letter][:number]
        found.append(tuple(own))
    return tuple(found)
