"""The single changes that a test should notice, one for each place of a module.

Left alone: what only people read (log lines, docstrings), what only mypy reads (annotations, asserts), and the tuned
numbers at the top of a module, of which nearly any value is right.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, Final

_SWAPPED: Final[dict[type[ast.AST], type[ast.AST]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}
_CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}
_LOGGERS: Final = frozenset({"log"})


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of a module."""

    module: str
    line: int
    what: str
    number: int
    """Among the module's mutants."""

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line} {self.what}"


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module."""
    places = _Places(ast.parse(source))
    return [Mutant(module, line, what, number) for number, (line, what, _) in enumerate(places.found)]


def mutated(mutant: Mutant, source: str) -> str:
    """The module's source with the change, without its comments."""
    tree = ast.parse(source)
    _, _, change = _Places(tree).found[mutant.number]
    change()
    return ast.unparse(ast.fix_missing_locations(tree))


def difference(mutant: Mutant, source: str) -> str:
    """What the change takes out and puts in, in a line."""
    before = ast.unparse(ast.parse(source)).splitlines()
    after = mutated(mutant, source).splitlines()
    lines = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    return " ".join(f"{line[0]} {line[1:].strip()}" for line in lines if line[:2] != "@@")


class _Places(ast.NodeVisitor):
    """Finds the places of a tree, each with a function that makes the change in the tree itself."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[tuple[int, str, Callable[[], None]]] = []
        self._depth = 0
        self.visit(tree)

    def _add(self, node: Any, what: str, change: Callable[[], None]) -> None:
        self.found.append((node.lineno, what, change))

    def _set(self, owner: Any, name: str, value: Any, what: str, node: Any) -> None:
        self._add(node, what, lambda: setattr(owner, name, value))

    # Statements

    def visit_Module(self, node: ast.Module) -> None:
        self._statements(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._statements(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._depth += 1
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self._statements(node)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def _statements(self, node: Any) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and self._depth and not isinstance(node, ast.ClassDef):
                for place, statement in enumerate(block):
                    if _can_go(statement):
                        self._add(statement, "left out", _replacer(block, place))
        super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant) and not _is_log(node):
            self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """What mypy is told."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assigned(node, node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assigned(node, node.value)

    def _assigned(self, node: Any, value: ast.expr) -> None:
        if self._depth:
            self.visit(value)
            return
        call = isinstance(value, ast.Call) and len(value.args) == 1 and ast.unparse(value.func) == "frozenset"
        owner, name = (value.args, 0) if isinstance(value, ast.Call) and call else (node, "value")
        inner = value.args[0] if isinstance(value, ast.Call) and call else value
        if isinstance(inner, (ast.Tuple, ast.List, ast.Set)) and inner.elts:
            empty = ast.Tuple([], ast.Load())
            change = _replacer(owner, 0, empty) if isinstance(owner, list) else None
            self._add(node, "emptied", change or (lambda: setattr(owner, str(name), empty)))
        elif isinstance(inner, ast.Dict) and inner.keys:
            self._set(node, "value", ast.Dict([], []), "emptied", node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            return
        if not (isinstance(node.value, ast.Constant) and not node.value.value):
            self._set(node, "value", ast.Constant(None), "returns None", node)
        self.visit(node.value)

    # Conditions

    def _condition(self, node: Any) -> None:
        if not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
            self._set(node, "test", ast.UnaryOp(ast.Not(), copy.deepcopy(node.test)), "condition negated", node.test)
        self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = _condition

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for place, test in enumerate(node.ifs):
            self._add(test, "condition left out", _replacer(node.ifs, place, ast.Constant(True)))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            if type(operator) in _SWAPPED:
                self._add(node, "comparison swapped", _replacer(node.ops, place, _SWAPPED[type(operator)]()))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._set(node, "op", _SWAPPED[type(node.op)](), "and/or swapped", node)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._set(node, "op", _Nothing(), "not left out", node)
        self.generic_visit(node)

    # Values

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in (ast.Add, ast.Sub) and not _is_text(node.left) and not _is_text(node.right):
            self._set(node, "op", _SWAPPED[type(node.op)](), "+/- swapped", node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            self._set(node.func, "id", _CALLS[node.func.id], f"{node.func.id} swapped", node)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not self._depth:
            return
        if isinstance(node.value, bool):
            self._set(node, "value", not node.value, "True/False swapped", node)
        elif isinstance(node.value, int):
            self._set(node, "value", node.value + 1, "off by one", node)

    def visit_keyword(self, node: ast.keyword) -> None:
        """A cache may as well be one larger; a `strict` is an assert; `usedforsecurity` is for kernels in FIPS mode."""
        if node.arg not in ("maxsize", "maxlen", "strict", "usedforsecurity"):
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        """Annotations."""


class _Nothing(ast.Not):
    """An operator that does nothing; `ast.unparse` has no word for it, so it is a plus of a truth value."""


def _as_is(self: Any, node: ast.UnaryOp) -> None:
    if isinstance(node.op, _Nothing):
        self.traverse(node.operand)
    else:
        _unparse_unary(self, node)


_unparse_unary = ast._Unparser.visit_UnaryOp  # type: ignore[attr-defined]
ast._Unparser.visit_UnaryOp = _as_is  # type: ignore[attr-defined]


def _can_go(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)) and not _is_log(statement)
    return isinstance(statement, (ast.Raise, ast.AugAssign, ast.Delete, ast.Continue, ast.Break))


def _is_log(node: ast.Expr) -> bool:
    call = node.value
    return isinstance(call, ast.Call) and any(
        isinstance(part, ast.Name) and part.id in _LOGGERS for part in ast.walk(call.func)
    )


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def _replacer(block: list[Any], place: int, by: ast.AST | None = None) -> Callable[[], None]:
    def change() -> None:
        block[place] = by or ast.Pass()

    return change
