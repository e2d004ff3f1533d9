"""Numbers in digits and in words, with their units, as values that can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from soma_vllm.method.gap.fact import Fact
from soma_vllm.method.gap.lexicon import FRACTIONS, ORDINALS, SCALES, TIMES_WORDS, UNITS

_I = re.IGNORECASE
NUMBER = re.compile(
    r"(?<![\w.])(?<!\d,)([$€£¥]\s?)?([+\-−–](?=\d))?(\d+(?:[.,'’\u00a0\u202f]\d+)*(?:\s\d{3}(?!\d))*)(?:\s?/\s?(\d+))?"
    r"(st|nd|rd|th|º|ª|er|ème|e)?(?![\d])"
)
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_UNIT = re.compile(r"\s?-?(km/h|m/s|°\s?[CFcf]\b|°|[%‰€$£¥]|[^\W\d_][^\W\d_]*[²2]?)")
_INCHES = re.compile(r"\s*(?:$|[.,;:)x×]|wide|long|high|tall|deep|thick)", _I)
_ALSO = {"pound": ("pound", 1.0), "pounds": ("pound", 1.0), "cents": ("dollar", 0.01), "cent": ("dollar", 0.01)}
"""Units whose names have another meaning too."""
_DEGREES = {"c": (1.0, 0.0), "f": (5 / 9, -160 / 9)}


def _plain(digits: str) -> list[float]:
    """Every value that digits with points and commas may stand for."""
    digits = re.sub(r"[\s'’\u00a0\u202f]", "", digits)
    marks = re.findall(r"[.,]", digits)
    if not marks:
        return [float(digits)]
    last = marks[-1]
    tail = digits.rsplit(last, 1)[1]
    grouped = re.fullmatch(r"\d{1,3}(?:[.,]\d{3})+", digits) is not None and len(set(marks)) == 1
    whole = float(re.sub(r"[.,]", "", digits))
    if len(marks) > 1 and len(set(marks)) == 1:
        return [whole] if grouped else []
    decimal = float(re.sub(r"[.,]", "", digits[: -len(tail) - 1]) + "." + tail)
    return [whole, decimal] if grouped else [decimal]


def _unit_at(text: str, at: int) -> tuple[str, float, float, int] | None:
    """(dimension, factor, offset, end) of the unit that begins at a position."""
    match = _UNIT.match(text, at)
    if match is None:
        return None
    name = re.sub(r"\s", "", match.group(1)).lower()
    if name.startswith("°") or name in (
        "degrees",
        "degree",
        "grad",
        "degrés",
        "grados",
        "celsius",
        "fahrenheit",
    ):
        scale = re.match(r"\s*(celsius|fahrenheit|[cf]\b)", text[match.end() : match.end() + 14], _I)
        letter = name[0] if name in ("celsius", "fahrenheit") else name[1:2] if name[0] == "°" else ""
        letter = letter or (scale.group(1)[0].lower() if scale else "c")
        factor, offset = _DEGREES[letter]
        return "temperature", factor, offset, match.end() + (scale.end() if scale else 0)
    if name in ("c", "f"):
        factor, offset = _DEGREES[name]
        return "temperature", factor, offset, match.end()
    per_hour = re.match(
        r"\s*(per|an|pro) (hour|stunde)|\s*(par|por) (heure|hora)", text[match.end() :][:16], _I
    )
    if per_hour and UNITS.get(name, ("", 0.0))[0] == "length":
        return "speed", UNITS[name][1] / 1000, 0.0, match.end() + per_hour.end()
    if name not in UNITS or match.group(1) == "a" or (name == "in" and not _INCHES.match(text, match.end())):
        return None
    dimension, factor = UNITS[name]
    return dimension, factor, 0.0, match.end()


def _quantity(
    text: str, start: int, end: int, values: list[float], weak: bool, currency: str = ""
) -> Fact | None:
    """A number with the unit and the scale that follow it."""
    if not values:
        return None
    scale = re.match(r"[\s-]*([^\W\d_]+)\b", text[end : end + 16])
    if scale and scale.group(1).lower() in SCALES:
        values = [value * SCALES[scale.group(1).lower()] for value in values]
        end += scale.end()
        weak = False
    elif short := re.match(
        r"(?:\s?([kKmM])|([kK]))\b(?!\w)" if currency else r"()([kK])\b", text[end : end + 3]
    ):
        larger = [value * (1e3 if (short.group(1) or "k") in "kK" else 1e6) for value in values]
        values = larger if currency else [*larger, *values]
        end += short.end()
    of = re.match(r"\s+(?:of\s+)?(?:an?|une?)\s+", text[end : end + 9]) if values[0] < 1 else None
    unit = _unit_at(text, end + (of.end() if of else 0))
    if unit is None and currency and currency in UNITS:
        unit = (*UNITS[currency], 0.0, end)
    if unit is None:
        return Fact("number", text[start:end], start, end, tuple((v, None, v) for v in values), weak)
    dimension, factor, offset, end = unit
    readings = tuple((v, dimension, v * factor + offset) for v in values)
    if other := _ALSO.get(text[:end].rsplit(None, 1)[-1].lower()):
        readings += tuple((v, other[0], v * other[1]) for v in values)
    return Fact("number", text[start:end], start, end, readings, weak and dimension not in ("euro", "dollar"))


def digits(match: re.Match[str]) -> Fact | None:
    currency, sign, digits, under, ordinal = match.groups()
    values = _plain(digits)
    if under is not None:
        if float(under) == 0:
            return None
        values = [value / float(under) for value in values]
    if sign in ("-", "−"):
        values = [-value for value in values]
    text = match.string
    if ordinal:
        readings = tuple((value, None, value) for value in values)
        return Fact("number", match.group(), match.start(), match.end(), readings)
    return _quantity(text, match.start(), match.end(), values, False, (currency or "").strip())


MIXED = re.compile(r"(?<![\w.,])(\d{1,4})\s+([1-9])\s?/\s?([2-9]|1\d)\b(?!/)")


def mixed(match: re.Match[str]) -> Fact | None:
    """2 1/2 hours."""
    value = int(match[1]) + int(match[2]) / int(match[3])
    return _quantity(match.string, match.start(), match.end(), [value], False)


def spelt(text: str, words: Mapping[str, int]) -> Iterator[Fact]:
    """Numbers in words."""
    done = 0
    for match in _WORD.finditer(text):
        if match.start() < done:
            continue
        word = match.group().lower().replace("’", "'")
        value: float | None = words.get(word)
        end = match.end()
        if value is not None:
            total, end = _chain(text, float(value), end, words)
            article = word in ("un", "una", "une", "um", "een", "uno") or word.startswith("ein")
            fact = _quantity(text, match.start(), end, [total], weak=total == 1 or (article and total == 1))
        elif word in ORDINALS:
            number = float(ORDINALS[word])
            fact = Fact(
                "number", match.group(), match.start(), end, ((number, None, number),), weak=number == 1
            )
        elif word in TIMES_WORDS:
            fact = Fact(
                "number",
                word,
                match.start(),
                end,
                ((float(TIMES_WORDS[word]), None, float(TIMES_WORDS[word])),),
                True,
            )
        elif word in FRACTIONS and word != "third":
            fact = _quantity(text, match.start(), end, [FRACTIONS[word]], weak=True)
        else:
            continue
        if fact is not None:
            done = fact.end
            yield fact


def _chain(text: str, value: float, end: int, words: Mapping[str, int]) -> tuple[float, int]:
    """The value of number words that follow each other: two hundred and five, three quarters."""
    total, current = 0.0, value
    for _ in range(6):
        following = re.match(r"[\s-]+(?:(?:and|y|et)\s+)?([^\W\d_]+(?:-[^\W\d_]+)*)", text[end : end + 40])
        if following is None:
            break
        word = following.group(1).lower()
        joined = re.match(r"[\s-]+(?:and|y|et)\s", following.group()) is not None
        if word in SCALES and not joined and SCALES[word] > 1:
            if SCALES[word] >= 1e3:
                total, current = total + current * SCALES[word], 0.0
            else:
                current *= SCALES[word]
        elif word in FRACTIONS and word.endswith("s") and not joined:
            current *= FRACTIONS[word]
        elif (
            word in words
            and current >= 20
            and words[word] < 10
            and (not joined or current >= 100 or "y" in following.group())
        ) or (word in words and (current >= 100 or (total and not current)) and words[word] < 100):
            current += words[word]
        else:
            break
        end += following.end()
    return total + current, end
