"""Renames the local variables of functions in a syntax tree: whatever they were called, equal programs become equal trees."""

import ast
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def rename_locals(tree: ast.Module) -> dict[str, str]:
    """Call every local variable by a number, in the order in which the tree names them first; return number -> old name.

    Numbers are no identifiers and none is given twice in a module: two variables never become one, and none hides another that it did not
    hide before. Whatever can be seen from outside a function keeps its name: parameters, imports, classes, functions that are decorated,
    used other than by a call, or around others (these can be asked for their names), and names that a class would mangle.
    """
    names = _Names()
    names.visit(tree)
    return names.rename()


class _Scope:
    """A module, class, function, lambda or comprehension, and the names that it binds."""

    def __init__(self, outer: "_Scope | None", node: ast.AST) -> None:
        self.outer = outer
        self.is_function = not isinstance(node, ast.Module | ast.ClassDef)
        self.is_comprehension = isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
        self.bound: set[str] = set()
        self.kept: set[str] = set()  # of these, not to be renamed
        self.functions: set[str] = set()
        self.globals: set[str] = set()
        self.nonlocals: set[str] = set()

    def home(self, name: str) -> "_Scope | None":
        """The function whose local the name is, by Python's rules; None for names of the module, of a class, and builtins."""
        scope: _Scope | None = self
        while scope:
            if scope is self or scope.is_function:  # the names of a class are seen directly in its body alone
                if name in scope.globals:
                    return None
                if name in scope.bound - scope.nonlocals:
                    return scope if scope.is_function else None
            scope = scope.outer
        return None


class _Names(ast.NodeVisitor):
    """Collects every place that names a variable, with the scope that looks it up."""

    def __init__(self) -> None:
        self._scope: _Scope
        self._places: list[tuple[_Scope, ast.AST, str]] = []  # the field of a node
        self._values: list[tuple[_Scope, str]] = []  # what is read, and not just called

    def rename(self) -> dict[str, str]:
        for scope, name in self._values:
            home = scope.home(name)
            if home and name in home.functions:
                home.kept.add(name)
        numbers: dict[tuple[_Scope, str], str] = {}

        def renamed(scope: _Scope, name: str) -> str:
            home = scope.home(name)
            if home is None or name in home.kept or name.startswith("__"):
                return name
            return numbers.setdefault((home, name), str(len(numbers)))

        for scope, node, field in self._places:
            found = getattr(node, field)
            setattr(node, field, renamed(scope, found) if isinstance(found, str) else [renamed(scope, name) for name in found])
        return {number: name for (_, name), number in numbers.items()}

    @contextmanager
    def _inside(self, node: ast.AST) -> Iterator[_Scope]:
        outer = self._scope
        self._scope = _Scope(outer, node)
        yield self._scope
        self._scope = outer

    def _visit_all(self, *groups: Iterable[ast.AST]) -> None:
        for group in groups:
            for node in group:
                self.visit(node)

    def _bind(self, node: ast.AST, field: str, scope: _Scope) -> None:
        scope.bound.add(getattr(node, field))
        self._places.append((scope, node, field))

    def visit_Module(self, node: ast.Module) -> None:
        self._scope = _Scope(None, node)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._values.append((self._scope, node.id))
            self._places.append((self._scope, node, "id"))
        else:
            self._bind(node, "id", self._scope)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name):
            self._places.append((self._scope, node.func, "id"))
        else:
            self.visit(node.func)
        self._visit_all(node.args, node.keywords)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        scope = self._scope
        while scope.is_comprehension and scope.outer:
            scope = scope.outer
        self._bind(node.target, "id", scope)
        self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._bind(node, "name", self._scope)
        holds_others = any(
            isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
            for part in node.body
            for inner in ast.walk(part)
        )
        (self._scope.kept if node.decorator_list or holds_others else self._scope.functions).add(node.name)
        self._visit_all(node.decorator_list, [node.returns] if node.returns else [])
        self._visit_function(node, node.args, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_function(node, node.args, [node.body])

    def _visit_function(self, node: ast.AST, args: ast.arguments, body: Iterable[ast.AST]) -> None:
        self.visit(args)  # defaults and annotations are looked up outside
        with self._inside(node) as inner:
            for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
                if arg:
                    inner.bound.add(arg.arg)
                    inner.kept.add(arg.arg)
            self._visit_all(body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._bind(node, "name", self._scope)
        self._scope.kept.add(node.name)
        self._visit_all(node.decorator_list, node.bases, node.keywords)
        with self._inside(node):
            self._visit_all(node.body)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        first, *others = node.generators
        self.visit(first.iter)  # looked up outside
        with self._inside(node):
            self._visit_all([first.target], first.ifs, others)
            self._visit_all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_alias(self, node: ast.alias) -> None:
        name = node.asname or node.name.partition(".")[0]
        self._scope.bound.add(name)
        self._scope.kept.add(name)

    def visit_ExceptHandler(self, node: ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping) -> None:
        field = "rest" if isinstance(node, ast.MatchMapping) else "name"
        if getattr(node, field) is not None:
            self._bind(node, field, self._scope)
        self.generic_visit(node)

    visit_MatchAs = visit_MatchStar = visit_MatchMapping = visit_ExceptHandler

    def visit_Global(self, node: ast.Global) -> None:
        self._scope.globals.update(node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self._scope.nonlocals.update(node.names)
        self._places.append((self._scope, node, "names"))
