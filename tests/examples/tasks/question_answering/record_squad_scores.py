"""Record ``squad_scores.json``: what transformers' own ``squad_metrics`` says on awkward cases.

transformers 5 no longer ships that module, so this is run once by hand, in an environment with
version 4 and nothing of ours: ``pip install transformers==4.57.1; python record_squad_scores.py``.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import transformers
from transformers.data.metrics.squad_metrics import get_raw_scores, normalize_answer

BY_HAND = [
    ("the cat", ["cat"]),
    ("The Cat.", ["a cat", "dog"]),
    ("an", ["the"]),
    ("", [""]),
    ("", ["cat"]),
    ("cat", [""]),
    ("the", [""]),
    ("...", ["a"]),
    ("cat", ["the", "cat"]),
    ("", ["the", "cat"]),
    ("U.S.A.", ["USA", "United States"]),
    ("well-known", ["well known", "wellknown"]),
    ("don't", ["dont", "do not"]),
    ("$4.2 million", ["4.2 million", "$42 million"]),
    ("1,243 kilometres", ["1243 kilometres", "1,243"]),
    ("14 March 1887", ["March 14, 1887"]),
    ("Theatre and anathema", ["theatre anathema"]),
    ("a a a b", ["a b b"]),
    ("Zürich", ["zurich", "ZÜRICH"]),
    ("ZU\u0308RICH", ["Zürich"]),
    ("Straße", ["STRASSE", "straße"]),
    ("İstanbul", ["istanbul"]),
    ("the “Cat”", ["Cat", "“cat”"]),
    ("rock \u2013 roll", ["rock roll", "rock - roll"]),
    ("new\u00a0york", ["New York"]),
    ("東京 タワー", ["東京タワー", "東京 タワー"]),
    ("to be or not to be", ["to be", "not to be or to be"]),
    ("tab\tand\nnewline", ["tab and newline"]),
    ("the_cat", ["thecat", "cat"]),
    ("50%", ["50 %", "50"]),
    ("a", ["A", "b"]),
    ("½ cup", ["½", "1/2 cup"]),
    ("an apple a day", ["apple day"]),
    ("THE", ["the", "x"]),
]
WORDS = [
    "the",
    "a",
    "An",
    "cat",
    "Cat.",
    "dog's",
    "New-York",
    "été",
    "İ",
    "ß",
    "12,000",
    "$5",
    "--",
]
WORDS += ["“cat”", "a.", "the-cat", "\u2013", "1887", "x\u00a0y", ""]


def random_cases(count):
    rng = random.Random(7)

    def text():
        return rng.choice((" ", " ", "  ", "\t")).join(rng.choices(WORDS, k=rng.randint(0, 5)))

    return [(text(), [text() for _ in range(rng.randint(1, 3))]) for _ in range(count)]


def record(prediction, gold):
    example = SimpleNamespace(qas_id="q", answers=[{"text": text} for text in gold])
    exact, f1 = get_raw_scores([example], {"q": prediction})
    return {
        "prediction": prediction,
        "gold": gold,
        "normalized": normalize_answer(prediction),
        "exact_match": exact["q"],
        "f1": f1["q"],
    }


if __name__ == "__main__":
    cases = [record(*case) for case in BY_HAND + random_cases(200)]
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    version = json.dumps(f"transformers {transformers.__version__}")
    text = f'{{"recorded_with": {version}, "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("squad_scores.json").write_text(text, encoding="utf-8")
