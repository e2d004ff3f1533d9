"""Writes the workloads of this folder, each session drawn from its own seed; running it again changes nothing.

Each task returns (user turn, check, a right answer) for every turn of a session. The right answers are not
written: tests give them to the checks. A later turn rests on what the first one set up and never on what a
model answered, so that its truth is known beforehand.

    python benchmarks/workloads/generate.py [DIR]
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from calendar import month_name
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

Turn = tuple[str, dict[str, Any], str]
Task = Callable[[random.Random, int], list[Turn]]

TURNS = 10
LONG = 14
PER_PART = 4
"""Sessions of each part, by the digest of their ids (study/workloads.py)."""

CITIES = ("Lima", "Oslo", "Cairo", "Quito", "Turin", "Perth", "Hanoi", "Accra", "Lyon", "Porto", "Sofia")
NAMES = ("Anna", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Klara")
GOODS = ("apples", "pears", "pens", "lamps", "chairs", "mugs", "books", "ropes", "tiles", "bells")
MONTHS = month_name[1:]


def fresh(seen: set[str], question: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
    """(question, truth) that this session has not had; after 50 tries one that it had."""
    for _ in range(50):
        asked, truth = question()
        if asked not in seen:
            break
    seen.add(asked)
    return asked, truth


def arithmetic(draw: random.Random, turns: int) -> list[Turn]:
    """Prices in turn 1, then what an order comes to."""
    prices = {thing: draw.randint(2, 9) for thing in draw.sample(GOODS, 4)}
    told = ", ".join(f"{thing} {price}" for thing, price in prices.items())
    found, seen = [], set[str]()

    def question() -> tuple[str, int]:
        thing, other = draw.sample(sorted(prices), 2)
        count, more = draw.randint(2, 6), draw.randint(1, 3)
        if len(found) < 3 or draw.random() < 0.6:
            return f"How much are {count} {thing}?", prices[thing] * count
        return f"How much are 1 of the {thing} and {more} {other}?", prices[thing] + prices[other] * more

    for number in range(turns):
        asked, total = fresh(seen, question)
        if number == 0:
            asked = (
                f"Prices in coins, each: {told}. Answer every question with the total as a number only. {asked}"
            )
        found.append((asked, {"kind": "numbers", "expected": [total], "where": "last"}, str(total)))
    return found


def lookup(draw: random.Random, turns: int) -> list[Turn]:
    """A table in turn 1, then one cell of it."""
    cities, months = draw.sample(CITIES, 4), draw.sample(MONTHS, 4)
    table = {city: {month: draw.randint(5, 199) for month in months} for city in cities}
    rows = "\n".join(f"{city}: " + ", ".join(f"{m} {v}" for m, v in row.items()) for city, row in table.items())
    found, seen = [], set[str]()

    def question() -> tuple[str, int]:
        city, month = draw.choice(cities), draw.choice(months)
        asked = draw.choice((f"{city} in {month}?", f"And {month} in {city}?", f"What about {city}, {month}?"))
        return asked, table[city][month]

    for number in range(turns):
        asked, value = fresh(seen, question)
        if number == 0:
            asked = f"Rainfall in mm:\n{rows}\nAnswer with the number and mm, nothing else. {asked}"
        found.append((asked, {"kind": "numbers", "expected": [value]}, f"{value} mm"))
    return found


def json_rules(draw: random.Random, turns: int) -> list[Turn]:
    """Readings as JSON with an alarm above a limit."""
    places = draw.sample(("pump", "boiler", "valve", "tank", "fan", "motor", "heater"), 3)
    limit = draw.choice((50, 60, 70, 80))
    found = []
    for number in range(turns):
        place, value = draw.choice(places), draw.randint(10, 99)
        value += value == limit
        asked = draw.choice((f"{place} reads {value}", f"{place}: {value}", f"We have {value} at the {place}."))
        expected = {"sensor": place, "value": value, "alarm": value > limit}
        if number == 0:
            example = json.dumps({"sensor": "door", "value": limit + 1, "alarm": True})
            asked = (
                "Turn each reading into one line of JSON with the keys sensor, value and alarm. alarm is true "
                f"if the value is above {limit}, else false. Example: door reads {limit + 1} -> {example}. "
                f"JSON only, no other text. First reading: {asked}"
            )
        found.append((asked, {"kind": "json", "expected": expected}, json.dumps(expected)))
    return found


SUBJECTS = ("The invoice", "Our team", "The new printer", "This report", "The office", "Your order")
ENDS = ("is ready now", "needs a new label", "is on the second floor", "went to the bank", "has three pages")
WRONG = {
    "e-mail": ("email", "Send an {} first"),
    "do not": ("don't", "We {} know it yet"),
    "web site": ("website", "The {} is new"),
    "can not": ("cannot", "They {} come today"),
    "per cent": ("percent", "It grew by ten {}"),
}


def edits(draw: random.Random, turns: int) -> list[Turn]:
    """Sentences put right by two rules."""
    old, other = draw.sample(sorted(WRONG), 2)
    new, instead = WRONG[old][0], WRONG[other][0]
    found, seen = [], set[str]()

    def question() -> tuple[str, str]:
        word = old if len(found) % 2 else other
        good, phrase = WRONG[word]
        tail = f"{draw.choice(SUBJECTS)} {draw.choice(ENDS)}"
        return f"{phrase.format(word)}. {tail}!", f"{phrase.format(good)}. {tail}."

    for number in range(turns):
        sentence, right = fresh(seen, question)
        asked = sentence
        if number == 0:
            asked = (
                f"Edit every text that I send by three rules and change nothing else: write {new} instead of "
                f"{old}; write {instead} instead of {other}; end with a full stop instead of an exclamation "
                f"mark. Answer with the edited text only. First text: {sentence}"
            )
        found.append((asked, {"kind": "equals", "expected": right, "ignore_space": True}, right))
    return found


def extraction(draw: random.Random, turns: int) -> list[Turn]:
    """Name, city and amount out of a sentence."""
    found = []
    for number in range(turns):
        name, city, amount = draw.choice(NAMES), draw.choice(CITIES), draw.randint(11, 990)
        sentence = draw.choice((
            "{n} from {c} paid {a} euros.", "We got {a} euros from {n}, who lives in {c}.",
            "In {c}, {n} spent {a} euros.", "{a} euros were sent to {c} by {n}.",
        )).format(n=name, c=city, a=amount)  # fmt: skip
        right = f"{name} | {city} | {amount}"
        asked = sentence
        if number == 0:
            asked = (
                "For each sentence answer with one line: name | city | amount. Example: Tom from Rome paid 12 "
                f"euros. -> Tom | Rome | 12. First sentence: {sentence}"
            )
        found.append((asked, {"kind": "equals", "expected": [right, right + "."], "ignore_space": True}, right))
    return found


TICKETS = {
    "BILLING": ("I was charged twice this month.", "Where is my invoice?", "Please refund my last payment.",
                "My credit card was declined.", "The price on my bill is wrong."),
    "SHIPPING": ("My parcel has not arrived.", "Can you change my delivery address?",
                 "The courier lost my package.", "When will my order be delivered?",
                 "The box came damaged by the courier."),
    "ACCOUNT": ("I forgot my password.", "How do I change my user name?", "I cannot log in to my profile.",
                "Please delete my account.", "My login code does not work."),
}  # fmt: skip


def routing(draw: random.Random, turns: int) -> list[Turn]:
    """A ticket's queue, as one word."""
    labels = draw.sample(sorted(TICKETS), 3)
    found, seen = [], set[str]()

    def question() -> tuple[str, str]:
        label = draw.choice(labels)
        greeting = draw.choice(("", "Hello. ", f"Hi, this is {draw.choice(NAMES)}. "))
        return f"Ticket: {greeting}{draw.choice(TICKETS[label])}", label

    for number in range(turns):
        asked, label = fresh(seen, question)
        if number == 0:
            rule = (
                "BILLING is for payments, SHIPPING for parcels and deliveries, ACCOUNT for logins and profiles."
            )
            asked = f"Sort tickets into {', '.join(labels)}. {rule} Answer with the one word only. {asked}"
        check = {"kind": "regex", "pattern": rf"{label}\.?", "whole": True}
        found.append((asked, check, label))
    return found


def conversion(draw: random.Random, turns: int) -> list[Turn]:
    """Dates as ISO 8601, lengths in metres."""
    found, seen = [], set[str]()

    def question() -> tuple[str, tuple[dict[str, Any], str]]:
        if draw.random() < 0.5:
            day = date(2021, 1, 1) + timedelta(days=draw.randrange(1500))
            right = day.isoformat()
            check = {"kind": "regex", "pattern": rf"{right}\.?", "whole": True}
            return f"{day.day} {MONTHS[day.month - 1]} {day.year}", (check, right)
        metres = draw.randint(2, 60) * 1000
        return f"{metres // 1000} km", ({"kind": "numbers", "expected": [metres]}, f"{metres} m")

    for number in range(turns):
        asked, (check, right) = fresh(seen, question)
        if number == 0:
            asked = (
                "I send dates and distances. Answer a date as YYYY-MM-DD and a distance in km as metres, such "
                f"as 7 May 2019 -> 2019-05-07 and 3 km -> 3000 m. Answer with the result only. {asked}"
            )
        found.append((asked, check, right))
    return found


def sql(draw: random.Random, turns: int) -> list[Turn]:
    """One SQLite query over one table."""
    table, thing = draw.choice((("books", "title"), ("films", "name"), ("songs", "label")))
    rows = [
        (
            f"{draw.choice(GOODS)} {number}",
            draw.choice(CITIES[:4]),
            draw.randint(1950, 2020),
            draw.randint(1, 9),
        )
        for number in range(12)
    ]
    given = [f"CREATE TABLE {table} ({thing} TEXT, city TEXT, year INTEGER, copies INTEGER)"]
    given += [f"INSERT INTO {table} VALUES {', '.join(map(repr, rows))}"]
    found, seen = [], set[str]()

    def question() -> tuple[str, str]:
        city, year, copies = draw.choice(CITIES[:4]), draw.randint(1960, 2010), draw.randint(2, 7)
        return draw.choice((
            (f"How many {table} are there?", "SELECT COUNT(*) FROM {t}"),
            (f"The {thing} of all {table} from {city}.", f"SELECT {thing} FROM {{t}} WHERE city = '{city}'"),
            (f"The {thing} of all {table} after {year}.", f"SELECT {thing} FROM {{t}} WHERE year > {year}"),
            (f"How many {table} are from {city}?", f"SELECT COUNT(*) FROM {{t}} WHERE city = '{city}'"),
            ("The sum of all copies.", "SELECT SUM(copies) FROM {t}"),
            (f"The {thing} of all {table} with more than {copies} copies.",
             f"SELECT {thing} FROM {{t}} WHERE copies > {copies}"),
            ("The earliest year.", "SELECT MIN(year) FROM {t}"),
            (f"The {thing} of all {table} before {year}.", f"SELECT {thing} FROM {{t}} WHERE year < {year}"),
        ))  # fmt: skip

    for number in range(turns):
        asked, query = fresh(seen, question)
        query = query.format(t=table)
        if number == 0:
            asked = (
                f"The SQLite table {table} has the columns {thing} (text), city (text), year (integer) and "
                f"copies (integer). Answer each request with one SQL query and nothing else. {asked}"
            )
        found.append((asked, {"kind": "sql", "expected": query, "given": given}, f"```sql\n{query};\n```"))
    return found


FUNCTIONS = (
    ("the sum of a and b", "a, b", "a + b", ("(2, 3) == 5", "(-1, 1) == 0")),
    ("the larger of a and b", "a, b", "max(a, b)", ("(2, 3) == 3", "(5, -1) == 5")),
    ("the text s in reverse", "s", "s[::-1]", ("('abc') == 'cba'", "('') == ''")),
    ("whether n is even", "n", "n % 2 == 0", ("(4) is True", "(7) is False")),
    ("the number of words in the text s", "s", "len(s.split())", ("('a b c') == 3", "('one') == 1")),
    ("the square of n", "n", "n * n", ("(3) == 9", "(-2) == 4")),
    ("the last element of the list x", "x", "x[-1]", ("([1, 2]) == 2", "(['a']) == 'a'")),
    ("the text s in upper case", "s", "s.upper()", ("('ab') == 'AB'", "('Q') == 'Q'")),
    ("the sum of the list x", "x", "sum(x)", ("([1, 2, 3]) == 6", "([]) == 0")),
    ("the list x sorted", "x", "sorted(x)", ("([2, 1]) == [1, 2]", "([]) == []")),
    ("the absolute value of n", "n", "abs(n)", ("(-3) == 3", "(2) == 2")),
    ("the mean of the list x", "x", "sum(x) / len(x)", ("([1, 3]) == 2", "([5]) == 5")),
    ("the first letter of the text s", "s", "s[0]", ("('abc') == 'a'", "('z') == 'z'")),
    ("the list x without its first element", "x", "x[1:]", ("([1, 2, 3]) == [2, 3]", "([4]) == []")),
)  # fmt: skip


def code(draw: random.Random, turns: int) -> list[Turn]:
    """Small Python functions, by tests."""
    found = []
    chosen = draw.sample(FUNCTIONS, turns)
    for number, (what, arguments, body, tests) in enumerate(chosen):
        name = draw.choice(("f", "g", "run", "calc", "solve")) + str(draw.randint(2, 9))
        asked = f"{name}({arguments}): {what}."
        if number == 0:
            asked = (
                "I name a Python function and what it returns; you answer with its code only, in one code "
                f"block, without examples or explanations. {asked}"
            )
        check = {"kind": "python", "asserts": [f"assert {name}{test}" for test in tests]}
        found.append((asked, check, f"```python\ndef {name}({arguments}):\n    return {body}\n```"))
    return found


TASKS: dict[str, tuple[Task, int]] = {
    "arithmetic": (arithmetic, TURNS), "code": (code, TURNS), "conversion": (conversion, TURNS),
    "edits": (edits, TURNS), "extraction": (extraction, TURNS), "json_rules": (json_rules, TURNS),
    "lookup": (lookup, LONG), "routing": (routing, LONG), "sql": (sql, TURNS),
}  # fmt: skip


def names(workload: str) -> Iterator[str]:
    """Ids such that each part has `PER_PART` sessions."""
    counts = [0, 0, 0]
    number = 0
    while min(counts) < PER_PART:
        number += 1
        name = f"{workload}-{number:02}"
        part = int(hashlib.sha256(f"{workload}.{name}".encode()).hexdigest(), 16) % 3
        if counts[part] < PER_PART:
            counts[part] += 1
            yield name


def made(workload: str) -> dict[str, list[Turn]]:
    """Every session of a workload."""
    task, turns = TASKS[workload]
    return {name: task(random.Random(f"{workload}/{name}"), turns) for name in names(workload)}


def main(folder: Path) -> None:
    """Write all of them."""
    for workload in TASKS:
        place = folder / workload
        place.mkdir(parents=True, exist_ok=True)
        sessions = made(workload)
        for file, column in (("sessions.json", 0), ("checks.json", 1)):
            lines = ",\n".join(
                f"{json.dumps(name)}: {json.dumps([turn[column] for turn in turns])}"
                for name, turns in sessions.items()
            )
            (place / file).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
