"""The gap that sees facts, by its rules alone: no fetched model."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from soma_vllm.config import Config
from soma_vllm.method.gap.facts_judge import FactsJudge, alike
from soma_vllm.method.gap.gap_judge import EncoderJudge, open_judge
from soma_vllm.method.gap.quantities import facts
from soma_vllm.method.gap.readings import Reading

THRESHOLD = 0.12
PAIRS = Path(__file__).parents[2] / "data" / "gap_pairs.jsonl"


class FlatEncoder:
    """Finds every text alike: only facts can tell two answers apart."""

    def read(self, texts: Sequence[str]) -> list[Reading]:
        return [Reading(row) for row in self.encode(texts)]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.ones((len(texts), 4), dtype=np.float32) / 2


class FarEncoder(FlatEncoder):
    """Finds no two texts alike."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.eye(len(texts), dtype=np.float32)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The sea is calm tonight, the moon lies fair.", "Good bread needs flour, water, salt and yeast."),
        ("Use a loop to iterate over the list.", "Photosynthesis turns light into energy."),
        ("Berlin", "Munich"),
        ("The capital of Australia is Canberra.", "Sydney."),
    ],
)
def test_answers_that_have_nothing_in_common_are_far_apart(a: str, b: str) -> None:
    (found,) = FactsJudge(FarEncoder()).gaps([(a, b)])
    assert found.value >= 0.5
    assert "they share no words" in found.why


def test_a_short_answer_that_the_longer_one_holds_is_near_however_far_the_encoder_finds_it() -> None:
    (found,) = FactsJudge(FarEncoder()).gaps(
        [("It returns False.", "When the queue is full, push returns False.")]
    )
    assert found.value <= THRESHOLD


def gap(a: str, b: str) -> float:
    (found,) = FactsJudge(FlatEncoder()).gaps([(a, b)])
    return found.value


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("12,400 people", "12400 people"),
        ("1.250,50 Euro", "1250.50 euros"),
        ("$4.2 billion", "4,200 million dollars"),
        ("half an hour", "30 minutes"),
        ("an hour and a half", "90 minutes"),
        ("2 h 30 min", "two and a half hours"),
        ("8:15 am", "08:15"),
        ("half past seven", "19:30"),
        ("14 h 30", "14:30"),
        ("halb acht", "7:30"),
        ("9 March 2026", "2026-03-09"),
        ("March 9, 2026", "9. März 2026"),
        ("5 de mayo de 2025", "05/05/2025"),
        ("100 °C", "212 °F"),
        ("25%", "a quarter"),
        ("fünfundzwanzig Euro", "25 €"),
        ("quatre-vingt-dix", "90"),
        ("one thousand two hundred and fifty", "1,250"),
        ("the 2nd train", "the second train"),
        ("2500 grams", "2.5 kg"),
        ("two and a quarter hours", "135 minutes"),
        ("an hour and a quarter", "75 minutes"),
        ("1 1/2 litres", "1500 ml"),
        ("10k", "10,000"),
        ("1h30", "90 minutes"),
        ("two hundredths of a second", "0.02 seconds"),
        ("las nueve y media de la noche", "21:30"),
        ("alle otto e mezza", "8:30"),
        ("at nine thirty", "9:30"),
        ("9.30 pm", "21:30"),
        ("sexta-feira", "Friday"),
        ("Mon–Fri", "Monday"),
    ],
)
def test_the_same_quantity_in_other_words_is_the_same(a: str, b: str) -> None:
    (one, *_), (other, *_) = facts(a, ["en"])[0], facts(b, ["en"])[0]
    assert one.same(other)
    assert other.same(one)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("08:15", "16:20"),
        ("21 mm", "35 mm"),
        ("5 km", "5 miles"),
        ("48 hours", "48 days"),
        ("9 March 2026", "3 September 2026"),
        ("$20", "€20"),
        ("-18 C", "18 C"),
        ("2 a.m.", "2 p.m."),
        ("version 2.10", "version 2.1"),
        ("Sat–Sun", "Sunday"),
        ("at 9.30", "9.30 euros"),
    ],
)
def test_another_quantity_is_another(a: str, b: str) -> None:
    (one, *_), (other, *_) = facts(a, ["en"])[0], facts(b, ["en"])[0]
    assert not one.same(other)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ('{"value": 88, "alarm": true}', '{"alarm": true,\n "value": 88.0}'),
        (
            "SELECT t FROM b WHERE y < 1950 ORDER BY y",
            "select x.t from b as x where 1950 > x.y order by y asc;",
        ),
        ("SELECT a FROM t WHERE b = 1 AND c = 2", "SELECT a FROM t WHERE c = 2 AND b = 1"),
        ("SELECT a FROM t WHERE y BETWEEN 1 AND 2", "SELECT a FROM t WHERE y >= 1 AND y <= 2"),
        ("def f(a):\n    return a if a else None", "def f(x):\n    if x:\n        return x\n    return None"),
        ("assert q.push(4) is False", "assert not q.push(4)"),
        ("city: Ghent\ndays: 2", 'days: 2\ncity: "Ghent"'),
        ("<a b='1' c='2'>x</a>", '<a c="2" b="1">x</a>'),
        ("x = f('a')", '```python\nx = f("a")  # said twice\n```'),
    ],
)
def test_data_and_code_are_equal_whatever_their_layout(a: str, b: str) -> None:
    assert alike(a, b) is not None
    assert gap(a, b) == 0.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ('{"value": 88}', '{"value": 31}'),
        ('{"alarm": true}', '{"alarm": 1}'),
        ('{"a": [1, 2]}', '{"a": [2, 1]}'),
        ('{"a": 1, "b": 2}', '{"a": 1}'),
        ('{"a": 1}', '{"a": 1'),
        ("SELECT t FROM b WHERE y < 1950 ORDER BY y ASC", "SELECT t FROM b WHERE y > 1950 ORDER BY y DESC"),
        ("SELECT a FROM t WHERE b = 1 OR c = 2", "SELECT a FROM t WHERE b = 1 AND c = 2"),
        ("def f(a):\n    return a + 1", "def f(a):\n    return a - 1"),
        ("def f(a):\n    return a", "def f(a)\n    return a"),
        ("for i in range(3):\n    print(i)", "for i in range(1, 3):\n    print(i)"),
    ],
)
def test_other_data_or_code_is_refused_and_the_reason_is_told(a: str, b: str) -> None:
    (found,) = FactsJudge(FlatEncoder()).gaps([(a, b)])
    assert found.value > THRESHOLD
    assert found.why


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The ferry leaves at 08:15.", "The ferry leaves at 16:20."),
        ("Yes, pop is slow.", "No, pop is not slow."),
        ("It returns False.", "When the queue is full, push returns True."),
        ("The shop is open on Sundays.", "The shop is closed on Sundays."),
        ("Anna is older than Ben.", "Ben is older than Anna."),
        ("Twelve emails and four letters were sent.", "Four emails and twelve letters were sent."),
        ("The capital of Peru is Lima.", "The capital of Peru is Quito."),
        ("Das Museum ist geöffnet.", "Das Museum ist nicht geöffnet."),
        ("The cat sleeps on the sofa.", ""),
        ("Store the bottle below 25 °C.", "Keep the bottle at over 25 °C."),
        (
            "Do not mix bleach with vinegar; it releases gas.",
            "You can mix bleach with vinegar; it releases no gas.",
        ),
        ("Run `chmod +x a.sh` first.", "Run `chmod -x a.sh` first."),
        ("- flour\n- sugar\n- three eggs", "You need flour, salt and 3 eggs."),
        ("Wash the pan, then dry the pot.", "Dry the pot, then wash the pan."),
        ("Only members with a card may enter.", "Members with a card may enter."),
        ("The nurse called the doctor.", "The doctor called the nurse."),
    ],
)
def test_contradictions_are_refused_though_the_encoder_finds_them_alike(a: str, b: str) -> None:
    assert gap(a, b) > THRESHOLD


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The clock was built in 1791 by Tamsin Orrin.", "Tamsin Orrin built the clock in 1791."),
        ("Ben is younger than Anna.", "Anna is older than Ben."),
        ("The shop is not open on Sundays.", "The shop is closed on Sundays."),
        ("The parcel weighs 2.5 kg.", "The weight of the parcel is 2500 grams."),
    ],
)
def test_the_same_in_other_words_passes(a: str, b: str) -> None:
    assert gap(a, b) <= THRESHOLD


def test_a_gap_does_not_depend_on_the_order_of_its_texts_or_on_other_pairs() -> None:
    pairs = [(found["a"], found["b"]) for found in map(json.loads, PAIRS.read_text().splitlines()[::6])]
    judge = FactsJudge(FlatEncoder())
    forth, back = judge.gaps(pairs), judge.gaps([(b, a) for a, b in pairs])
    assert [one.value for one in forth] == pytest.approx([one.value for one in back])
    assert judge.gaps(pairs[7:8])[0] == forth[7]
    assert [one.value for one in judge.gaps([(a, a) for a, _ in pairs])] == [0.0] * len(pairs)


def test_no_text_makes_it_raise_and_every_gap_is_in_range() -> None:
    random_ = random.Random(7)
    pieces = [*"{}[]\"'`()\n \x00\ud800½٣²🙂\\", "```", "<a ", ">", "select", "from", "9" * 400, "1/0"]
    pieces += ["def f(", "0.0.0", "31.02.2020", "99:99", "e-9", "in", "and"]
    texts = ["".join(random_.choices(pieces, k=random_.randrange(1, 40))) for _ in range(400)]
    found = FactsJudge(FlatEncoder()).gaps(list(zip(texts[::2], texts[1::2], strict=True)))
    assert all(0.0 <= one.value <= 1.0 for one in found)


def test_a_long_text_takes_bounded_time() -> None:
    long = "The 3 editors met 12 times (in Vell). " * 400_000
    begun = time.monotonic()
    assert gap(long, long + "No.") > THRESHOLD
    assert gap("[" * 1_000_000, "{" * 1_000_000) >= 0.0
    assert time.monotonic() - begun < 60


def test_the_configuration_chooses_the_judge() -> None:
    assert isinstance(open_judge(Config(), FlatEncoder()), FactsJudge)
    plain = open_judge(Config.model_validate({"gate": {"gap": "encoder"}}), FlatEncoder())
    assert isinstance(plain, EncoderJudge)
    assert [one.value for one in plain.gaps([("88", "31")])] == [0.0]
