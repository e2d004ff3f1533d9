"""SQL in one normal form, by its tokens: two queries that differ in layout, aliases or the order of ANDed
conditions
are equal.

It knows what usual queries hold; anything else is compared as it stands. It never raises.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[A-Za-z_]\w*\]|\d+(?:\.\d+)?|[^\W\d]\w*|<>|!=|<=|>=|==|\|\||\S",
    re.DOTALL,
)
_STARTS = ("select", "insert", "update", "delete", "create", "with", "alter", "drop")
_CLAUSES = (
    "select", "from", "where", "group by", "having", "order by", "limit", "offset", "set", "values", "on",
    "join",
    "left join", "right join", "full join", "cross join", "union", "union all", "insert into", "update",
    "delete from",
)  # fmt: skip
_WORDS = {
    "select", "from", "where", "group", "order", "by", "having", "limit", "offset", "set", "values", "on",
    "join", "left",
    "right", "full", "cross", "inner", "outer", "union", "all", "and", "or", "not", "in", "is", "null",
    "like", "between",
    "as", "asc", "desc", "distinct", "insert", "into", "update", "delete", "count", "sum", "avg", "min",
    "max", "true",
    "false", "case", "when", "then", "else", "end", "exists", "using",
}  # fmt: skip


def is_sql(text: str) -> bool:
    """Whether a text begins as a statement does."""
    words = re.findall(r"\w+|\S", text[:400].lower())
    if not words or words[0] not in _STARTS:
        return False
    return any(word in words[1:] for word in ("from", "into", "set", "table", "values", "as", "*"))


def normal_form(text: str) -> list[str]:
    """Tokens of a statement, normalised: equal lists mean the same query."""
    tokens = [_token(found) for found in _TOKEN.findall(text) if not found.startswith(("--", "/*"))]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    tokens = _joined(tokens)
    tokens = _unaliased(tokens)
    tokens = _spelt_out(tokens)
    return _sorted_clauses(tokens)


def _token(found: str) -> str:
    if found[0] == '"' and found[-1] == '"':
        return (
            found[1:-1].lower()
            if re.fullmatch(r'"[A-Za-z_]\w*"', found) and found[1:-1].islower()
            else f"'{found[1:-1]}'"
        )
    if found[0] in "`[" and len(found) > 1:
        return found[1:-1].lower()
    if found[0] == "'":
        return found
    return {"<>": "!=", "==": "="}.get(found, found.lower())


def _joined(tokens: list[str]) -> list[str]:
    """Keywords of several words as one token; words without effect left out."""
    kept: list[str] = []
    for token in tokens:
        before = kept[-1] if kept else ""
        if token in ("outer", "asc") or (token == "as" and before):
            kept.append("as") if token == "as" else None
        elif token == "join" and before in ("inner", "left", "right", "full", "cross"):
            kept[-1] = "join" if before == "inner" else f"{before} join"
        elif (
            (token == "by" and before in ("group", "order"))
            or (token == "into" and before == "insert")
            or (token == "from" and before == "delete")
            or (token == "all" and before == "union")
        ):
            kept[-1] = f"{before} {token}"
        else:
            kept.append(token)
    return kept


def _is_name(token: str) -> bool:
    return token.isidentifier() and token not in _WORDS and token not in _CLAUSES


def _unaliased(tokens: list[str]) -> list[str]:
    """Tables by name, not alias; columns unqualified where there is one table; no column aliases."""
    tables: dict[str, str] = {}
    names: list[str] = []
    kept: list[str] = []
    columns: dict[str, list[str]] = {}
    clause = ""
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token in _CLAUSES:
            clause = token
        naming = clause in ("from", "update", "insert into", "delete from") or clause.endswith("join")
        after = at + 1
        if naming and _is_name(token) and kept and kept[-1] in (clause, ","):
            names.append(token)
            tables[token] = token
            alias = after + 1 if after < len(tokens) and tokens[after] == "as" else after
            if alias < len(tokens) and _is_name(tokens[alias]):
                tables[tokens[alias]] = token
                after = alias + 1
            kept.append(token)
        elif clause == "select" and token == "as" and after < len(tokens):
            start = max((n for n, one in enumerate(kept) if one in ("select", ",")), default=-1) + 1
            columns[tokens[after]] = kept[start:]
            after += 1
        else:
            kept.append(token)
        at = after
    return _resolved(kept, tables, columns, single=len(set(names)) == 1)


def _resolved(
    tokens: list[str], tables: dict[str, str], columns: dict[str, list[str]], single: bool
) -> list[str]:
    kept: list[str] = []
    at, clause = 0, ""
    while at < len(tokens):
        token = tokens[at]
        clause = token if token in _CLAUSES else clause
        if token in tables and tokens[at + 1 : at + 2] == ["."]:
            if not single:
                kept += [tables[token], "."]
            at += 2
            continue
        if clause in ("order by", "having", "group by") and token in columns:
            kept += columns[token]
        else:
            kept.append(token)
        at += 1
    return kept


def _spelt_out(tokens: list[str]) -> list[str]:
    """BETWEEN as two comparisons, booleans and counts in one spelling, no brackets around a whole condition."""
    kept: list[str] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token == "between" and tokens[at + 2 : at + 3] == ["and"] and at + 3 < len(tokens):
            name = kept[-3:] if kept[-2:-1] == ["."] else kept[-1:]
            kept += [">=", tokens[at + 1], "and", *name, "<=", tokens[at + 3]]
            at += 4
        elif token == "not" and tokens[at + 1 : at + 2] and _is_name(tokens[at + 1]):
            end = at + 4 if tokens[at + 2 : at + 3] == ["."] else at + 2
            plain = tokens[end : end + 1] in ([], ["and"], ["or"], [")"]) or tokens[end] in _CLAUSES
            kept += [*tokens[at + 1 : end], "=", "false"] if plain else tokens[at:end]
            at = end
        elif token == "is" and tokens[at + 1 : at + 2] in (["true"], ["false"]):
            kept.append("=")
            at += 1
        elif tokens[at : at + 4] == ["count", "(", "1", ")"]:
            kept += ["count", "(", "*", ")"]
            at += 4
        else:
            kept.append(token)
            at += 1
    for word in ("where", "on", "having"):
        kept = _unbracketed(kept, word)
    return kept


def _unbracketed(tokens: list[str], word: str) -> list[str]:
    """Without brackets around the whole of the first condition that follows a word."""
    at = tokens.index(word) + 1 if word in tokens else len(tokens)
    depth = 0
    for close in range(at, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[close], 0)
        if depth <= 0:
            whole = close > at and (close + 1 == len(tokens) or tokens[close + 1] in _CLAUSES)
            return [*tokens[:at], *tokens[at + 1 : close], *tokens[close + 1 :]] if whole else tokens
    return tokens


def _sorted_clauses(tokens: list[str]) -> list[str]:
    """Conditions joined by AND, the sides of =, and members of IN in one order."""
    tokens = _sorted_members(tokens)
    kept: list[str] = []
    at = 0
    while at < len(tokens):
        kept.append(tokens[at])
        at += 1
        if kept[-1] not in ("where", "on", "having"):
            continue
        end = at
        depth = 0
        while end < len(tokens) and (depth or tokens[end] not in _CLAUSES):
            depth += {"(": 1, ")": -1}.get(tokens[end], 0)
            if depth < 0:
                break
            end += 1
        kept += _conditions(tokens[at:end])
        at = end
    return kept


def _conditions(tokens: list[str]) -> list[str]:
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == "and" and depth == 0:
            parts.append([])
        elif token == "or" and depth == 0:
            return tokens
        else:
            parts[-1].append(token)
    turned = sorted(_turned(part) for part in parts)
    return [token for n, part in enumerate(turned) for token in ([*(["and"] if n else []), *part])]


_MIRROR = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _turned(part: list[str]) -> list[str]:
    signs = [n for n, token in enumerate(part) if token in _MIRROR]
    if len(signs) != 1:
        return part
    left, sign, right = part[: signs[0]], part[signs[0]], part[signs[0] + 1 :]
    if right == ["0"] and sign == "=":
        right = ["false"]
    if right == ["1"] and sign == "=":
        right = ["true"]
    constant = bool(left) and (left[0][0] in "'" or left[0][0].isdigit())
    names = bool(right) and not (right[0][0] == "'" or right[0][0].isdigit() or right[0] in ("true", "false"))
    if constant or (names and sign in ("=", "!=") and left > right):
        return [*right, _MIRROR[sign], *left]
    return [*left, sign, *right]


def _sorted_members(tokens: list[str]) -> list[str]:
    kept: list[str] = []
    at = 0
    while at < len(tokens):
        if tokens[at] == "in" and tokens[at + 1 : at + 2] == ["("] and ")" in tokens[at:]:
            close = tokens.index(")", at)
            members = tokens[at + 2 : close]
            if "select" not in members:
                members = sorted(token for token in members if token != ",")
            kept += ["in", "(", *members, ")"]
            at = close + 1
        else:
            kept.append(tokens[at])
            at += 1
    return kept
