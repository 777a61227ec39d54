"""The normal form of source code: equal for programs that differ in words alone, never for two that can compute different things.

It is a program too and means the same as the source; so equal forms mean equal programs. What is gone: positions and comments, docstrings,
the wording of messages, and the names of local variables.
"""

import ast
from collections.abc import Iterable, Iterator
from functools import cache

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
# What sees the names of locals, a docstring or printed text while a program runs. A module that mentions one is left as it is written.
SEES_WORDS = frozenset(
    [
        *("locals", "f_locals", "f_code", "_getframe", "currentframe", "co_varnames", "co_freevars", "co_cellvars", "co_consts"),
        *("eval", "exec", "query", "numexpr", "getsource", "getdoc", "__doc__", "__qualname__"),
        *("redirect_stdout", "redirect_stderr", "__future__", "*"),
    ]
)
REFUSALS = frozenset({"refuse", "Refused"})
REPORTS = frozenset({"say", "warn", "print"})
BAR_REPORTS = frozenset({"set_postfix_str", "set_description", "set_description_str"})
BAR_TEXTS = frozenset({"desc", "unit"})  # of tqdm


@cache
def normal_form(source: bytes) -> str:
    """Dump the normalised syntax tree. The source is bytes because a comment may name its encoding."""
    return ast.dump(normalised(source))


def normalised(source: bytes) -> ast.Module:
    """Parse a module and bring it into its normal form."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    if not any(_sees_words(node) for node in nodes):
        for message in list(_messages(nodes)):
            _drop_wording(message)
        for node in nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        rename_locals(tree)
    return tree


def rename_locals(tree: ast.Module) -> dict[str, str]:
    """Call the local variables of functions by numbers, which no identifiers are; return number -> old name.

    They count in the order in which the functions name them first, and none is given twice in a module.
    """
    names: dict[str, str] = {}
    for function in _outermost(tree):
        names |= _Variables(function).rename(len(names))
    return names


def _sees_words(node: ast.AST) -> bool:
    if getattr(node, "type_params", None):  # scopes of Python 3.12 that _Variables does not know
        return True
    if isinstance(node, ast.Call):  # vars() and dir() are locals(); DataFrame.eval reads text, Module.eval takes none
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return (name in ("vars", "dir") and not node.args) or (name == "eval" and bool(node.args))
    if isinstance(node, ast.Attribute) and node.attr == "eval":
        return False
    words = [getattr(node, field, None) for field in ("id", "attr", "module", "name")]
    return any(isinstance(word, str) and not SEES_WORDS.isdisjoint(word.split(".")) for word in words)


def _outermost(node: ast.AST) -> Iterator[FUNCTIONS]:
    """The functions that lie in no other one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            yield child
        else:
            yield from _outermost(child)


class _Variables(ast.NodeVisitor):
    """The local variables of a function and of all that is defined in it.

    A name is one of them if it is bound wherever it is read, so that it never means something of the module. Names that can be seen from
    outside are kept: parameters, imports, functions, classes and their attributes, and names that a class would mangle.
    """

    def __init__(self, function: FUNCTIONS) -> None:
        self._scopes: list[set[str]] = []  # names bound by each function and comprehension around the node
        self._functions: list[set[str]] = []  # the functions among them
        self._kept: set[str] = set()
        self._reads: list[tuple[str, list[set[str]]]] = []  # a name, and the scopes around it
        self._places: list[tuple[ast.AST, str]] = []  # the fields of nodes that name a variable
        self._nonlocals: list[ast.Nonlocal] = []
        self.visit(function)

    def rename(self, first: int) -> dict[str, str]:
        self._kept |= {name for name, scopes in self._reads if not any(name in scope for scope in scopes)}
        numbers: dict[str, str] = {}
        for node, field in self._places:
            name = getattr(node, field)
            if name not in self._kept and not name.startswith("__"):
                setattr(node, field, numbers.setdefault(name, str(first + len(numbers))))
        for statement in self._nonlocals:
            statement.names = [numbers.get(name, name) for name in statement.names]
        return {number: name for name, number in numbers.items()}

    def _bind(self, node: ast.AST, field: str, scopes: list[set[str]]) -> None:
        (scopes[-1] if scopes else self._kept).add(getattr(node, field))
        self._places.append((node, field))

    def _visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in filter(None, nodes):
            self.visit(node)

    def _visit_body(self, body: Iterable[ast.AST], names: set[str]) -> set[str]:
        """Of a function or a class, in a scope that has these names. Returns all that are bound in it."""
        self._scopes.append(names)
        self._functions.append(names)
        self._visit_all(body)
        self._functions.pop()
        return self._scopes.pop()

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._reads.append((node.id, self._scopes.copy()))
            self._places.append((node, "id"))
        else:
            self._bind(node, "id", self._scopes)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, "id", self._functions)  # of the function around a comprehension
        self.visit(node.value)

    def visit_FunctionDef(self, node: FUNCTIONS) -> None:
        if not isinstance(node, ast.Lambda):
            self._kept.add(node.name)
            self._visit_all([*node.decorator_list, node.returns])
        args = node.args
        self.visit(args)  # defaults and annotations are looked up outside
        names = {arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if arg}
        self._kept |= names
        self._visit_body([node.body] if isinstance(node, ast.Lambda) else node.body, names)

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        first, *others = node.generators
        self.visit(first.iter)  # looked up outside
        self._scopes.append(set())
        self._visit_all([first.target, *first.ifs, *others, *([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])])
        self._scopes.pop()

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._kept.add(node.name)
        self._visit_all([*node.decorator_list, *node.bases, *node.keywords])
        self._kept |= self._visit_body(node.body, set())  # its attributes

    def visit_ExceptHandler(self, node: ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping) -> None:
        field = "rest" if isinstance(node, ast.MatchMapping) else "name"
        if getattr(node, field) is not None:
            self._bind(node, field, self._scopes)
        self.generic_visit(node)

    visit_MatchAs = visit_MatchStar = visit_MatchMapping = visit_ExceptHandler

    def visit_alias(self, node: ast.alias) -> None:
        self._kept.add(node.asname or node.name.partition(".")[0])

    def visit_Global(self, node: ast.Global) -> None:
        self._kept.update(node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self._nonlocals.append(node)


def _messages(nodes: list[ast.AST]) -> Iterator[ast.expr]:
    """Arguments that a person reads: of raised errors, of refusals, reports and progress bars.

    A function is known by its name, which must be imported as such and nothing else in the module, or be the builtin print. The result of
    a report must not be used.
    """
    imported = {node.asname or node.name.partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    ours = (imported ^ {"print"}) - _assigned(nodes)
    unused = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    raised = {id(node.exc) for node in nodes if isinstance(node, ast.Raise)}
    for node in nodes:
        match node:
            case ast.Call(func=ast.Name(id=name) as owner) | ast.Call(func=ast.Attribute(value=owner, attr=name)):
                known = isinstance(owner, ast.Name) and owner.id in ours
            case _:
                continue
        files = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg in ("file", None)]
        on_console = all(file in ("sys.stdout", "sys.stderr") for file in files)
        is_report = (known and name in REPORTS and on_console) or name in BAR_REPORTS
        if id(node) in raised or (known and name in REFUSALS) or (is_report and id(node) in unused):
            yield from node.args
        elif known and name == "tqdm":
            yield from (keyword.value for keyword in node.keywords if keyword.arg in BAR_TEXTS)


def _assigned(nodes: list[ast.AST]) -> set[str | None]:
    """Every name that the module binds anywhere, other than by importing what is called so."""
    names: set[str | None] = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    names |= {node.asname for node in nodes if isinstance(node, ast.alias) and node.asname != node.name}
    others = [node for node in nodes if not isinstance(node, ast.alias | ast.keyword)]
    return names | {getattr(node, field, None) for node in others for field in ("name", "arg", "rest")}


def _drop_wording(message: ast.expr) -> None:
    """Empty the literals of a message. One without a space stays: it may be a key or a mode, for somebody who catches the error."""
    literals: list[ast.Constant] = []
    joined: list[ast.JoinedStr] = []
    waiting: list[ast.expr] = [message]
    while waiting:
        match waiting.pop():
            case ast.Constant(value=str()) as literal:
                literals.append(literal)
            case ast.JoinedStr() as text:
                joined.append(text)
                literals += [part for part in text.values if isinstance(part, ast.Constant)]
            case ast.BinOp(left=first, op=ast.Add() | ast.Mod(), right=second) | ast.IfExp(body=first, orelse=second):
                waiting += [first, second]
    if any(" " in str(literal.value) for literal in literals):
        for literal in literals:
            literal.value = ""
        for text in joined:
            text.values = [part for part in text.values if not isinstance(part, ast.Constant)]
