"""Answers that are data or code: JSON, YAML-like lines, markup, SQL, Python, and other code by its tokens.

Guarantees: two answers of one form are equal exactly where their normal forms are; code is never run; no text
raises.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from soma_vllm.method.gap import python_code, sql_text

_FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_CODE = re.compile(
    r"\bdef \w+\s*\(|^\s*class \w+.*:\s*$|^\s*return\b|^\s*(?:for|while|if|elif|else|try|except"
    r"|with)\b.*:\s*$|^\s*(?:import|from) "
    r"\w[\w.]*|=>|\bfunction\b.*[({]|^\s*assert |^\s*(?:const|let|var) \w|#include|"
    r"^\s*(?:git|grep|docker|chmod|rm|cp|mv|sudo|npm|pip|curl|kubectl|ssh|tar|sed|awk) \S+|\\[dwsb][+*{$\-]|"
    r"^(?:for|while|if|def|class) [^\n]*\n\s+\S|"
    r"^[\w.]+\([^)]*\)?\s*;?\s*$|;\s*$|^\s*@\w+|^\$ \w",
    re.MULTILINE,
)
_ASSIGNMENT = re.compile(r"^\s*\w[\w.\[\]]* [-+*/]?= \S", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/|(?:(?<=\s)|^)(?://|#(?!include))[^\n]*", re.DOTALL | re.MULTILINE)
_TOKEN = re.compile(
    r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|\d+(?:\.\d+)?|\w+|[-+*/%=<>!&|]=|[-+&|<>*/]{2}|=>|\S"
)
_PROSE = re.compile(r"[^\W\d_]{2,}")
_PAIR = re.compile(r"^(\s*-?\s*)([A-Za-z_][\w -]{0,40}):\s*(.*?)\s*$")
_TAG = re.compile(r"<(/?)([A-Za-z][\w:-]*)((?:\s+[\w:-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'))*)\s*(/?)>")
_ATTRIBUTE = re.compile(r"([\w:-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")


@dataclass(frozen=True)
class Form:
    """An answer as data or code."""

    kind: str
    """json, keys, markup, sql or code."""
    normal: Any
    """Comparable with that of another answer of this kind; None where it is broken."""
    source: str


@dataclass(frozen=True)
class Difference:
    """What two answers of one form have apart."""

    equal: bool
    why: tuple[str, ...] = ()


def split(text: str) -> tuple[str, str]:
    """The code of an answer and the prose around it; no code where nothing is fenced off."""
    blocks = _FENCE.findall(text)
    if blocks:
        return "\n".join(block.rstrip() for block in blocks), _FENCE.sub(" ", text).strip()
    return "", text


def form(text: str) -> Form | None:
    """An answer's form, None where it is prose."""
    code, _ = split(text)
    body = (code or text).strip()
    if not code and body.startswith("`") and body.endswith("`") and body.count("`") == 2:
        body = body[1:-1]
    if (found := _json(body)) is not None:
        return found
    if (found := _markup(body)) is not None:
        return found
    inline = _INLINE.findall(body) if not code else []
    if not sql_text.is_sql(body) and len(inline) == 1 and sql_text.is_sql(inline[0]):
        body = inline[0]
    if sql_text.is_sql(body):
        return Form("sql", sql_text.normal_form(body) if _balanced(body) else None, body)
    if (found := _keys(body)) is not None:
        return found
    if code or (_CODE.search(body[:4000]) and not _is_prose(body)):
        return _code(body)
    if _ASSIGNMENT.search(body[:4000]) and (found := _code(body)).normal and found.normal[0] == "python":
        return found
    return None


def _is_prose(text: str) -> bool:
    """Whether sentences outweigh symbols."""
    words = len(_PROSE.findall(text))
    symbols = sum(text.count(sign) for sign in "(){}[]=<>;_+*/")
    return words > 6 and symbols < words / 3


def _json(body: str) -> Form | None:
    """The one JSON object or array of a text, with little around it."""
    starts = [at for at in (body.find("{"), body.find("[")) if at >= 0]
    if not starts:
        return None
    start = min(starts)
    if len(_PROSE.findall(body[:start])) > 12 or (
        body[start] == "[" and not re.match(r'\[\s*[\[{"\d\]tfn-]', body[start:])
    ):
        return None
    if not re.match(r'\{\s*["}]|\[', body[start:]):
        return None
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(body[start:])
    except (ValueError, RecursionError):
        looks = re.match(r'\{\s*"[^"\n]*"\s*:', body[start:]) is not None
        return Form("json", None, body) if looks else None
    rest = body[start + end :]
    if "{" in rest or (body[start] == "[" and _PROSE.search(rest)):
        return None if body[start] == "[" else _json_lines(body)
    return Form("json", _plain(value), body)


def _json_lines(body: str) -> Form | None:
    values = []
    for line in body.splitlines():
        try:
            values.append(_plain(json.loads(line)))
        except (ValueError, RecursionError):
            return None
    return Form("json", values, body)


def _plain(value: Any) -> Any:
    """Whole numbers in one type; True stays apart from 1."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bool) or value is None:
        return repr(value)
    return float(value) if isinstance(value, int) and abs(value) < 2**53 else value


def _keys(body: str) -> Form | None:
    """Lines of `key: value`, as in YAML; at least two."""
    lines = [line for line in body.splitlines() if line.strip() and line.strip() != "---"]
    pairs = [_PAIR.match(line) for line in lines]
    if len(lines) < 2 or not all(pairs) or any(len((p[3] if p else "").split()) > 12 for p in pairs):
        return None
    found = [(p[1].replace(" ", ""), p[2].strip().lower(), _scalar(p[3])) for p in pairs if p is not None]
    listed = any(mark for mark, _, _ in found)
    return Form("keys", found if listed else sorted(found, key=str), body)


def _scalar(text: str) -> object:
    text = text.split(" #")[0].strip().strip("\"'")
    try:
        return float(text)
    except ValueError:
        return text.rstrip(".").lower()


def _markup(body: str) -> Form | None:
    """Tags with their attributes in one order."""
    if not body.startswith("<") or not body.endswith(">"):
        return None
    found: list[Any] = []
    stack: list[str] = []
    at, broken = 0, False
    for tag in _TAG.finditer(body):
        text = " ".join(body[at : tag.start()].split())
        found += [text] if text else []
        at = tag.end()
        closing, name, attributes, alone = tag.groups()
        if closing:
            broken = broken or not stack or stack.pop() != name
        elif not alone and name not in ("br", "hr", "img", "input", "meta", "link"):
            stack.append(name)
        found.append((closing, name, sorted((a[0], a[1] or a[2]) for a in _ATTRIBUTE.findall(attributes))))
    if not found:
        return None
    return Form("markup", None if broken or stack else found, body)


def _code(body: str) -> Form:
    body = "\n".join(line.removeprefix("$ ") for line in body.splitlines())
    parsed = python_code.normal_form(body)
    if parsed is not None:
        return Form("code", ("python", parsed), body)
    return Form("code", ("tokens", tokens(body)) if _balanced(body) else None, body)


def tokens(body: str) -> tuple[str, ...]:
    """Tokens of code in any language; strings in one kind of quotes, no comments, no closing semicolons."""
    found = [
        f"'{token[1:-1]}'" if len(token) > 1 and token[0] == token[-1] == '"' else token
        for token in _TOKEN.findall(_COMMENT.sub(" ", body))
    ]
    return tuple(
        t for n, t in enumerate(found) if not (t == ";" and (n + 1 == len(found) or found[n + 1] == "}"))
    )


def _balanced(body: str) -> bool:
    """Whether brackets outside strings close what they open."""
    stack: list[str] = []
    for token in _TOKEN.findall(body):
        if token in ("(", "[", "{"):
            stack.append({"(": ")", "[": "]", "{": "}"}[token])
        elif token in (")", "]", "}") and (not stack or stack.pop() != token):
            return False
    return not stack


def compare(a: str, b: str) -> Difference | None:
    """How two answers differ as data or code; None where one of them is prose."""
    forms = form(a), form(b)
    one, other = forms
    if one is None or other is None:
        return _lone(a, b, one or other)
    if one.kind != other.kind:
        return Difference(False, (f"one is {one.kind}, the other {other.kind}",))
    if (one.normal is None) != (other.normal is None):
        return Difference(False, (f"one is broken {one.kind}",))
    if one.kind == "code" and one.normal is not None and one.normal[0] != other.normal[0]:
        looks = any(
            re.search(r"^\s*(?:def|class|for|while|if|with|try)\b[^{;]*$", f.source, re.M) for f in forms if f
        )
        if looks or any(f.normal[1].startswith("Module") for f in forms if f and f.normal[0] == "python"):
            same = tokens(one.source) == tokens(other.source)
            return Difference(same, () if same else ("the code of one does not parse",))
    if one.normal is None:
        one, other = (Form(f.kind, tokens(f.source), f.source) for f in (one, other))
    if one.normal == other.normal:
        return Difference(True)
    return Difference(False, _why(one, other))


def _lone(a: str, b: str, found: Form | None) -> Difference | None:
    """One answer is data or code: the other may hold it within a sentence."""
    if found is None:
        return None
    text = b if (form(a) or found).source == found.source and form(a) is not None else a
    shown = [match for match in _INLINE.findall(text)]
    if any(_code(one).normal == _code(found.source).normal for one in shown) or found.source.strip() in text:
        return Difference(True)
    if found.kind in ("json", "sql", "markup"):
        return Difference(False, (f"one is {found.kind}, the other is not",))
    return None


def _why(one: Form, other: Form) -> tuple[str, ...]:
    """The first differences of two normal forms."""
    if one.kind == "json":
        return tuple(_paths(one.normal, other.normal, "$"))[:4]
    if one.kind == "keys":
        return tuple(f"{key}: {value}" for _, key, value in one.normal if (_, key, value) not in other.normal)[
            :4
        ] or ("keys differ",)
    a = one.normal if one.kind == "sql" else tokens(one.source)
    b = other.normal if other.kind == "sql" else tokens(other.source)
    these, those = list(map(str, a)), list(map(str, b))
    in_a, in_b = set(these), set(those)
    lost, more = [t for t in these if t not in in_b][:3], [t for t in those if t not in in_a][:3]
    return (f"{one.kind} differs: {' '.join(lost) or '-'} / {' '.join(more) or '-'}",)


def _paths(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{path}.{name}: in one alone" for name in sorted(a.keys() ^ b.keys())]
        return found + [line for name in a if name in b for line in _paths(a[name], b[name], f"{path}.{name}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            line for n, (x, y) in enumerate(zip(a, b, strict=True)) for line in _paths(x, y, f"{path}[{n}]")
        ]
    return [] if a == b else [f"{path}: {a} / {b}"]
