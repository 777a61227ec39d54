"""The normal form of source code: equal for programs that differ in words alone, never for two that can compute different things.

It is a program too and means the same as the source; so equal forms mean equal programs. What is gone: positions and comments, docstrings,
the wording of messages, and the names of local variables.
"""

import ast
from collections.abc import Iterator
from functools import cache

from kdlib.local_names import rename_locals

# What sees the names of locals, a docstring or printed text while a program runs. A module that mentions one is left as it is written.
SEES_WORDS = frozenset(
    {
        *("locals", "eval", "exec", "query", "numexpr", "_getframe", "currentframe", "f_locals", "f_code", "getsource"),
        *(
            "co_varnames",
            "co_freevars",
            "co_cellvars",
            "co_consts",
            "__qualname__",
            "__doc__",
            "getdoc",
            "__future__",
            "redirect_stdout",
            "redirect_stderr",
            "*",
        ),
    }
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
    if not any(_sees_words(node) for node in ast.walk(tree)):
        for message in list(_messages(tree)):
            _drop_wording(message)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        rename_locals(tree)
    return tree


def _sees_words(node: ast.AST) -> bool:
    if getattr(node, "type_params", None):  # scopes of Python 3.12 that rename_locals does not know
        return True
    if isinstance(node, ast.Call):  # vars() and dir() are locals(); DataFrame.eval reads text, Module.eval takes none
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return (name in ("vars", "dir") and not node.args) or (name == "eval" and bool(node.args))
    if isinstance(node, ast.Attribute) and node.attr == "eval":
        return False
    words = [getattr(node, field, None) for field in ("id", "attr", "module", "name")]
    return any(isinstance(word, str) and not SEES_WORDS.isdisjoint(word.split(".")) for word in words)


def _messages(tree: ast.Module) -> Iterator[ast.expr]:
    """Arguments that a person reads: of raised errors, of refusals, reports and progress bars.

    A function is known by its name, which must be imported as such and nothing else in the module, or be the builtin print. The result of
    a report must not be used.
    """
    nodes = list(ast.walk(tree))
    imported: set[object] = {node.asname or node.name.partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    ours = (imported ^ {"print"}) - _assigned(nodes)
    unused = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    raised = {id(node.exc) for node in nodes if isinstance(node, ast.Raise)}
    for node in nodes:
        match node:
            case ast.Call(func=ast.Name(id=name)):
                known = name in ours
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                known = isinstance(owner, ast.Name) and owner.id in ours
            case _:
                continue
        is_report = (known and name in REPORTS and _on_console(node)) or name in BAR_REPORTS
        if id(node) in raised or (known and name in REFUSALS) or (is_report and id(node) in unused):
            yield from node.args
        elif known and name == "tqdm":
            yield from (keyword.value for keyword in node.keywords if keyword.arg in BAR_TEXTS)


def _assigned(nodes: list[ast.AST]) -> set[object]:
    """Every name that the module binds anywhere, other than by importing what is called so."""
    found: set[object] = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    found |= {node.asname for node in nodes if isinstance(node, ast.alias) and node.asname != node.name}
    others = [node for node in nodes if not isinstance(node, ast.alias | ast.keyword)]
    return found | {getattr(node, field, None) for node in others for field in ("name", "arg", "rest")}


def _on_console(call: ast.Call) -> bool:
    files = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in ("file", None)]
    return all(file in ("sys.stdout", "sys.stderr") for file in files)


def _drop_wording(message: ast.expr) -> None:
    """Empty the literals of a message. One without a space stays: it may be a key or a mode, for somebody who catches the error."""
    literals: list[ast.Constant] = []
    joined: list[ast.JoinedStr] = []
    waiting = [message]
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
