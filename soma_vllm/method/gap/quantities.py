"""Numbers, dates, times and identifiers of a text, in forms that can be compared.

Guarantees: the same quantity in other words is the same (12,400 and 12400, half an hour and 30 minutes, 9
March 2026
and 2026-03-09, 5 pm and 17:00); what is ambiguous (1.250, 5/6/2025, half past seven) is equal to each of its
readings.
Time is linear in the text; no text raises.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping

from soma_vllm.method.gap.fact import Fact
from soma_vllm.method.gap.lexicon import (
    AMBIGUOUS_MONTHS,
    AMBIGUOUS_NUMBERS,
    MONTHS,
    NUMBER_WORDS,
    STOPWORDS,
    UNITS,
    WEEKDAYS,
)
from soma_vllm.method.gap.numerals import MIXED, NUMBER, digits, mixed, spelt

_MONTH = "|".join(sorted(map(re.escape, MONTHS), key=len, reverse=True))
_SEP = r"(?:\s+(?:of|de|di|van)\s+|[\s.\-]+)"
_I = re.IGNORECASE
_IDENTIFIER = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.]+|https?://[^\s<>()]+|(?<!\w)(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]+)*/?"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b|\bv?\d+\.\d+\.\d+\b|(?<=[Vv]ersion )\d+\.\d+"
    r"|(?<![°\w])[A-Z]{1,5}-?\d+[A-Z\d-]*\b"
    r"|(?<![°\w])[A-Z]{2,5} \d{2,}\b"
    r"|\+\d[\d ()/-]{6,}\d|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
)
_ISO = re.compile(r"\b(\d{4})[-/](\d{1,2})[-/](\d{1,2})(?!\d)")
_NUMERIC = re.compile(r"\b(\d{1,2})[./-](\d{1,2})[./-](\d{4}|\d{2})\b")
_DAY_DOT = re.compile(r"\b(\d{1,2})\.\s?(\d{1,2})\.(?=\s+[a-zäöü])")
_DAY_MONTH = re.compile(
    rf"\b(\d{{1,2}})(?:st|nd|rd|th|er|º)?{_SEP}({_MONTH})\b\.?(?:(?:,?\s+(?:de\s+|of\s+)?)((?:1\d|20)\d\d)\b)?",
    _I,
)
_MONTH_DAY = re.compile(
    rf"\b({_MONTH})\.?\s+(\d{{1,2}})(?:st|nd|rd|th)?\b(?!:)(?:,?\s+((?:1\d|20)\d\d)\b)?", _I
)
_MONTH_YEAR = re.compile(rf"\b({_MONTH})\.?\s+(?:de\s+|of\s+)?((?:1\d|20)\d\d)\b", _I)
_AM_PM = (
    r"\s*(a\.?m\b\.?|p\.?m\b\.?|de la mañana|de la tarde|de la noche|in the (?:morning|afternoon|evening))?"
)
_CLOCK = re.compile(rf"\b([01]?\d|2[0-4]):([0-5]\d)(?::[0-5]\d)?\b{_AM_PM}(?:\s*uhr\b)?", _I)
_DOT_CLOCK = re.compile(
    r"\b([01]?\d|2[0-4])\.([0-5]\d)\s*(uhr\b|o'clock\b|h\b|[ap]\.?m\b\.?)"
    r"|\b(?:alle|dalle|at|um|às)\s+([01]?\d|2[0-4])\.([0-5]\d)\b(?!\s*(?:[%€$£°]|per|euro|dollar|pound|k?[mg]\b))",
    _I,
)
_H_CLOCK = re.compile(r"\b([01]?\d|2[0-4])\s?(?:h|heures?|uhr)\s?([0-5]\d)?\b(?!/)", _I)
_AM = re.compile(r"\b(1[0-2]|[1-9])\s*(a\.?m\b\.?|p\.?m\b\.?|o'clock\b|o’clock\b)", _I)
_PAST = {
    "half past": 30,
    "quarter past": 15,
    "viertel nach": 15,
    "quarter to": -15,
    "viertel vor": -15,
    "halb": -30,
}
_SPOKEN = re.compile(r"\b(half past|quarter past|quarter to|halb|viertel nach|viertel vor)\s+(\w+)\b", _I)
_MINUTES = re.compile(
    rf"\b(?:at|by|until|before|after|around|from)\s+(\w+)[ -](ten|fifteen|twenty|thirty|forty|forty-five|fifty)"
    rf"\b{_AM_PM}|\b(?:las?|le|alle|dalle|às|à|vers)\s+(\w+)(?:\s+heures?)?\s+((?:y|e|et)\s+(?:media|mezza|meia"
    rf"|demie|cuarto|un quarto|quart)|(?:menos|moins)\s+(?:le\s+)?(?:cuarto|quart))\b{_AM_PM}",
    _I,
)
_AT = re.compile(
    r"\b(at|um|by|until)\s+([^\W\d_]+)\b(?!\s+(?:percent|%|euros?))(?:\s*o['’]clock|\s*uhr\b)?(?=\s*(?:$|[.,;!?]))",
    _I,
)
_CLOCK_WORD = re.compile(r"\b(\w+)\s*(?:o['’]clock|uhr)\b", _I)
_HALVES = re.compile(
    r"\b(an?|one|\d+|two|three|four|five|six|seven|eight)\s+(\w+)\s+and\s+(a\s+half|a\s+quarter|three\s+quarters)\b",
    _I,
)
_HALF_MORE = re.compile(
    r"\b(\w+)\s+(?:and\s+(a\s+half|a\s+quarter|three\s+quarters)\s+(\w+)"
    r"|(horas?|heures?|días?|jours?)\s+(?:y\s+media|et\s+demie))\b",
    _I,
)
_DAYS = re.compile(
    r"\b(Mon|Tues?|Wed|Thu(?:rs?)?|Fri)\b\.?|(?<=[-–/,] )(?:Sat|Sun)\b\.?|(?<=[-–/,])(?:Sat|Sun)\b\.?"
    r"|\b(?:Sat|Sun)\b\.?(?=\s*[-–/,]|$)|\b(?:Mo|Di|Mi|Do|Fr|Sa|So)\b\.?(?=\s*[-–]\s*(?:Mo|Di|Mi|Do|Fr|Sa|So)\b)"
    r"|(?<=[-–])(?:Mo|Di|Mi|Do|Fr|Sa|So)\b"
)
_DAY_NUMBERS = {
    name: number
    for number, names in enumerate(("mo", "tu di", "we mi", "th do", "fr", "sa", "su so"))
    for name in names.split()
}
_DURATION = re.compile(
    r"\b(\d+)\s*(?:h|hrs?|hours?|std|stunden?|heures?|horas?)\s*(?:and|und|et|y)?\s*([0-5]?\d)\s*min\w*", _I
)
_PARTS = {"three": 0.75, "quarter": 0.25}
_NOON = re.compile(r"\b(noon|midday|midnight|mittags?|mitternacht|midi|minuit|mediodía|medianoche)\b", _I)
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_LIST_MARK = re.compile(r"(?m)^\s*(?:\d{1,2}[.)]|[-*•])\s+")
_VULGAR = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4"})


def languages(text: str) -> frozenset[str]:
    """Languages whose function words the text has most of; empty where it has fewer than two."""
    words = [word.lower() for word in _WORD.findall(text)[:400] if len(word) > 1 or not word.isascii()]
    counts = {name: sum(word in known for word in words) for name, known in STOPWORDS.items()}
    most = max(counts.values())
    return frozenset(name for name, count in counts.items() if count >= max(2, 0.6 * most))


@functools.lru_cache(maxsize=256)
def _number_words(spoken: frozenset[str]) -> Mapping[str, int]:
    """Number words of a text in these languages; those of other languages where they are no other words."""
    return {
        word: number
        for name, table in NUMBER_WORDS.items()
        for word, number in table.items()
        if name in spoken or word not in AMBIGUOUS_NUMBERS
    }


class _Reader:
    """One pass over a text: each pattern takes what earlier ones left."""

    def __init__(self, text: str, spoken: Iterable[str]) -> None:
        self.text = text.translate(_VULGAR)
        self.facts: list[Fact] = []
        self.words = _number_words(frozenset(spoken))

    def take(self, pattern: re.Pattern[str], read: Callable[[re.Match[str]], Fact | None]) -> None:
        """Add what `read` makes of each match, and blank it out."""
        kept: list[str] = []
        done = 0
        for match in pattern.finditer(self.text):
            fact = read(match)
            if fact is None:
                continue
            self.facts.append(fact)
            kept += [self.text[done : match.start()], " " * (match.start() - done and 0)]
            kept.append("\x00" * (match.end() - match.start()))
            done = match.end()
        if done:
            self.text = "".join(kept) + self.text[done:]


def _fact(match: re.Match[str], kind: str, *readings: tuple[object, ...]) -> Fact:
    return Fact(kind, match.group().strip(), match.start(), match.end(), readings)


def _identifier(match: re.Match[str]) -> Fact:
    text = match.group().rstrip(".,;:")
    return _fact(
        match, "identifier", (re.sub(r"[\s()+-]", "", text).lower().removeprefix("https://").rstrip("/"),)
    )


def _date(year: str | None, month: int, day: str | None) -> tuple[object, ...] | None:
    number = int(day) if day else None
    if not 1 <= month <= 12 or (number is not None and not 1 <= number <= 31):
        return None
    full = None if year is None else int(year) + (2000 if len(year) == 2 else 0)
    return full, month, number


def _numeric_date(match: re.Match[str]) -> Fact | None:
    first, second, year = match.groups()
    both = [_date(year, int(second), first)]
    if "." not in match.group():  # with points the day always stands first
        both.append(_date(year, int(first), second))
    readings = tuple(one for one in both if one is not None)
    return _fact(match, "date", *readings) if readings else None


def _named_date(year: str | None, month: str, day: str | None, match: re.Match[str]) -> Fact | None:
    date = _date(year, MONTHS[month.lower()], day)
    return None if date is None else _fact(match, "date", date)


def _minutes(hour: int, minute: int, mark: str | None, spoken: bool = False) -> tuple[tuple[object, ...], ...]:
    """The readings of a time of day; without a mark a spoken one may be in either half of the day."""
    mark = (mark or "").lower().replace(".", "")
    if mark.startswith("p") or "tarde" in mark or "noche" in mark or "afternoon" in mark or "evening" in mark:
        hour = hour % 12 + 12
    elif mark.startswith("a") or "mañana" in mark or "morning" in mark:
        hour %= 12
    elif spoken and hour <= 12:
        first = (hour % 12) * 60 + minute
        return ((first % 1440,), ((first + 720) % 1440,))
    return (((hour * 60 + minute) % 1440,),)


def _spoken_time(reader: _Reader) -> Callable[[re.Match[str]], Fact | None]:
    """Half past seven, halb acht, at nine, eight o'clock."""

    def read(match: re.Match[str]) -> Fact | None:
        *lead, word = (group.lower() for group in match.groups())
        hour = int(word) if word.isdigit() else reader.words.get(word)
        if hour is None or not 1 <= hour <= 24:
            return None
        minute = _PAST.get(lead[0], 0) if lead else 0
        hour, minute = (hour - 1, minute + 60) if minute < 0 else (hour, minute)
        return _fact(match, "time", *_minutes(hour, minute, None, spoken=True))

    return read


def _hour_and_minutes(reader: _Reader) -> Callable[[re.Match[str]], Fact | None]:
    """At nine thirty, las nueve y media, à neuf heures moins le quart."""

    def read(match: re.Match[str]) -> Fact | None:
        word, more = (match[1] or match[4]).lower(), (match[2] or match[5]).lower()
        hour = int(word) if word.isdigit() else reader.words.get(word)
        if hour is None or not 1 <= hour <= 24:
            return None
        minute = reader.words.get(more, 15 if "art" in more else 30)
        if more.startswith("m"):
            hour, minute = hour - 1, 60 - minute
        return _fact(match, "time", *_minutes(hour, minute, match[3] or match[6], spoken=True))

    return read


def _dotted(match: re.Match[str]) -> Fact:
    mark = match[3] if match[3] and match[3][0] in "aApP" else None
    hour, minute = int(match[1] or match[4]), int(match[2] or match[5])
    return _fact(match, "time", *_minutes(hour, minute, mark, spoken=match[1] is None and hour < 10))


def _noon(match: re.Match[str]) -> Fact:
    word = match.group().lower()
    return _fact(match, "time", (0,) if word in ("midnight", "mitternacht", "minuit", "medianoche") else (720,))


def facts(text: str, spoken: Iterable[str]) -> tuple[list[Fact], str]:
    """The quantities of a text, in its order, and the text with them blanked out (NUL, length kept)."""
    listed = len(_LIST_MARK.findall(text)) > 1
    reader = _Reader(_LIST_MARK.sub(lambda m: " " * len(m.group()), text) if listed else text, spoken)
    take = reader.take
    take(_ISO, lambda m: None if (d := _date(m[1], int(m[2]), m[3])) is None else _fact(m, "date", d))
    take(_NUMERIC, _numeric_date)
    take(_IDENTIFIER, _identifier)
    take(_DAY_DOT, lambda m: None if (d := _date(None, int(m[2]), m[1])) is None else _fact(m, "date", d))
    take(_DAY_MONTH, lambda m: _named_date(m[3], m[2], m[1], m))
    take(_MONTH_DAY, lambda m: _named_date(m[3], m[1], m[2], m))
    take(_MONTH_YEAR, lambda m: _named_date(m[2], m[1], None, m))
    take(_CLOCK, lambda m: _fact(m, "time", *_minutes(int(m[1]), int(m[2]), m[3], spoken=_bare(m))))
    take(_DOT_CLOCK, _dotted)
    take(_DURATION, lambda m: _fact(m, "number", _seconds(int(m[1]) * 3600 + int(m[2]) * 60)))
    take(_H_CLOCK, _hours)
    take(_AM, lambda m: _fact(m, "time", *_minutes(int(m[1]), 0, m[2], spoken="clock" in m[2].lower())))
    take(_MINUTES, _hour_and_minutes(reader))
    for pattern in (_SPOKEN, _CLOCK_WORD, _AT):
        take(pattern, _spoken_time(reader))
    take(_NOON, _noon)
    take(_HALVES, _and_a_half(reader))
    take(_HALF_MORE, _and_a_half(reader))
    take(_DAYS, lambda m: _fact(m, "weekday", (_DAY_NUMBERS[m[0][:2].lower()],)))
    take(MIXED, mixed)
    take(NUMBER, digits)
    for fact in spelt(reader.text, reader.words):
        reader.facts.append(fact)
        reader.text = reader.text[: fact.start] + "\x00" * (fact.end - fact.start) + reader.text[fact.end :]
    _calendar(reader)
    # A number's unit lies behind its match.
    rest = list(reader.text)
    for fact in reader.facts:
        rest[fact.start : fact.end] = "\x00" * (fact.end - fact.start)
    return sorted(reader.facts, key=lambda fact: fact.start), "".join(rest)


def _bare(match: re.Match[str]) -> bool:
    """Whether a clock time may be in either half of the day: 7:30, but neither 07:30 nor 7:30 Uhr."""
    return not match[1].startswith("0") and len(match[1]) == 1 and not match[0].lower().rstrip().endswith("uhr")


def _hours(match: re.Match[str]) -> Fact | None:
    """14 h 30, 19 heures, 8 Uhr; a bare "3 h" is a duration."""
    if match[2] is None and re.search(r"\dh$|\d\s+h$|heure$", match[0], _I):
        return None
    if (
        match[2] is None
        and "heures" in match[0]
        and not re.search(r"\b[àÀ]\s*$", match.string[: match.start()][-4:])
    ):
        return None
    return _fact(match, "time", *_minutes(int(match[1]), int(match[2] or 0), None))


def _seconds(seconds: float) -> tuple[object, ...]:
    return seconds / 3600, "time", float(seconds)


def _and_a_half(reader: _Reader) -> Callable[[re.Match[str]], Fact | None]:
    def read(match: re.Match[str]) -> Fact | None:
        count = match[1].lower()
        number = 1 if count in ("a", "an") else int(count) if count.isdigit() else reader.words.get(count)
        words = [group.lower() for group in match.groups()[1:] if group]
        unit = next((UNITS[word] for word in words if word in UNITS), None)
        if unit is None or number is None:
            return None
        more = next((part for word, part in _PARTS.items() if any(word in one for one in words)), 0.5)
        value = number + more
        return _fact(match, "number", (value, unit[0], value * unit[1]))

    return read


def _calendar(reader: _Reader) -> None:
    """Weekdays and months that stand alone."""
    for match in _WORD.finditer(reader.text):
        word = match.group().lower()
        if word in WEEKDAYS:
            reader.facts.append(_fact(match, "weekday", (WEEKDAYS[word],)))
        elif word in MONTHS and (word not in AMBIGUOUS_MONTHS or _named(match)):
            reader.facts.append(_fact(match, "date", (None, MONTHS[word], None)))


def _named(match: re.Match[str]) -> bool:
    """Whether an ambiguous month is capitalised where no sentence begins, or is the whole text."""
    before = match.string[: match.start()].rstrip()
    alone = not match.string.replace(match.group(), "").strip(" .\x00")
    return (
        match.group()[0].isupper()
        and len(match.group()) > 2
        and (alone or (bool(before) and before[-1] not in ".!?:"))
    )
