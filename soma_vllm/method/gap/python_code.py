"""Python in one normal form, by its syntax tree: layout, comments, docstrings, annotations and the names of
local
variables do not count, nor a few ways to say the same.

Guarantee: code is parsed, never run; what does not parse has no form.
"""

from __future__ import annotations

import ast
import textwrap
import warnings

LONGEST = 20_000
"""Characters that are parsed: deeper nesting than any answer has exhausts the parser."""


def normal_form(text: str) -> str | None:
    """The tree of a program as text, None where it is no Python."""
    if len(text) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an invalid escape in the answer
            tree = ast.parse(textwrap.dedent(text))
        return ast.dump(_Renamed().visit(_Plain().visit(tree)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Plain(ast.NodeTransformer):
    """One way to say a thing."""

    def _body(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Without docstrings and `pass`; `if c: return x` before `return y` is one returned choice."""
        kept = [
            one
            for one in body
            if not (
                isinstance(one, ast.Pass) or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
            )
        ]
        while (
            len(kept) >= 2
            and isinstance(last := kept[-1], ast.Return)
            and isinstance(choice := kept[-2], ast.If)
        ):
            if len(choice.body) != 1 or choice.orelse or not isinstance(first := choice.body[0], ast.Return):
                break
            none = ast.Constant(None)
            kept[-2:] = [ast.Return(_choice(choice.test, first.value or none, last.value or none))]
        if len(kept) == 1 and isinstance(kept[0], ast.If) and len(kept[0].body) == len(kept[0].orelse) == 1:
            yes, no = kept[0].body[0], kept[0].orelse[0]
            if isinstance(yes, ast.Return) and isinstance(no, ast.Return):
                none = ast.Constant(None)
                kept = [ast.Return(_choice(kept[0].test, yes.value or none, no.value or none))]
        return kept

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, name, None), list):
                setattr(node, name, self._body(body))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return self.generic_visit(ast.Assign([node.target], node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        load = ast.parse(ast.unparse(node.target), mode="eval").body
        return ast.Assign([node.target], ast.BinOp(load, node.op, node.value))

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        if isinstance(call := node.exc, ast.Call) and not call.args and not call.keywords:
            node.exc = call.func
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        left, sign, right = node.left, node.ops[0], node.comparators[0]
        if isinstance(right, ast.Constant) and isinstance(right.value, bool):
            same = isinstance(sign, ast.Is | ast.Eq)
            if same or isinstance(sign, ast.IsNot | ast.NotEq):
                return left if same == right.value else _not(left)
        if _is_length(left) and isinstance(right, ast.Constant) and right.value == 0:
            assert isinstance(left, ast.Call)
            if isinstance(sign, ast.Eq):
                return _not(left.args[0])
            if isinstance(sign, ast.Gt | ast.NotEq):
                return left.args[0]
        turned = {ast.Gt: ast.Lt, ast.GtE: ast.LtE}.get(type(sign))
        if turned is not None:
            return ast.Compare(right, [turned()], [left])
        if isinstance(sign, ast.Eq | ast.NotEq) and isinstance(left, ast.Constant):
            return ast.Compare(right, [sign], [left])
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return _not(node.operand) if isinstance(node.op, ast.Not) else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return _choice(node.test, node.body, node.orelse)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "range" and len(node.args) == 2 and getattr(node.args[0], "value", None) == 0:
            node.args = node.args[1:]
        node.keywords.sort(key=lambda keyword: keyword.arg or "")
        return node


def _is_length(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "len"
        and len(node.args) == 1
    )


_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Gt: ast.LtE, ast.GtE: ast.Lt,
}  # fmt: skip


def _not(node: ast.expr) -> ast.expr:
    """The negation, moved into a comparison."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        sign = _OPPOSITE[type(node.ops[0])]
        if sign in (ast.Gt, ast.GtE):
            turned = ast.Lt if sign is ast.Gt else ast.LtE
            return ast.Compare(node.comparators[0], [turned()], [node.left])
        return ast.Compare(node.left, [sign()], node.comparators)
    return ast.UnaryOp(ast.Not(), node)


def _choice(test: ast.expr, yes: ast.expr, no: ast.expr) -> ast.expr:
    """A conditional expression whose test is no negation."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, yes, no = test.operand, no, yes
    if [getattr(one, "value", None) for one in (yes, no)] == [True, False]:
        return test
    return ast.IfExp(test, yes, no)


class _Renamed(ast.NodeTransformer):
    """Local variables by the order in which they appear; all other names stay."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def visit_Module(self, node: ast.Module) -> ast.AST:
        for one in ast.walk(node):
            if isinstance(one, ast.arg) and one.arg not in ("self", "cls"):
                self._bind(one.arg)
            elif (
                isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store) and not self._is_result(one, node)
            ):
                self._bind(one.id)
        return self.generic_visit(node)

    @staticmethod
    def _is_result(name: ast.Name, module: ast.Module) -> bool:
        """Whether a name is bound at the top: others may read it."""
        return any(
            isinstance(one, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == name.id for t in one.targets)
            for one in module.body
        )

    def _bind(self, name: str) -> None:
        self._names.setdefault(name, f"v{len(self._names)}")

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._names.get(node.id, node.id), ast.Load())

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._names.get(node.arg, node.arg))
