"""Names that end in letters of dimensions tell the truth: checked as the library runs, under pytest.

`install()` puts an import hook in front of Python's: files of llama_jax that have such names are compiled with
a check behind each assignment to one and behind each function's parameters. A value of x_BTD must have three
dimensions, and a letter one size within a call of a function; of what is first assigned in a loop, within one
turn of it; in a comprehension, within one name. A size of 1 goes with any other: a mask without segments is the same
for all of B, and is broadcast. Digits are sizes: slope_BT1. Letters that are not in dims.py (X, Y) have no
meaning elsewhere, and likewise one size.

Values without a shape (None, numbers, tuples) pass, tracers do not. Processes that tests start are not checked.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator
from typing import Any

PACKAGE = "llama_jax"
APART = {"llama_jax.analysis.scaling"}  # N and D are numbers there: of parameters and of tokens
# Lower case before the suffix: KEYS_AND_VALUES and HOST_GB_S are constants. h = H/2, d = D/2.
SUFFIX = re.compile(r"_*[a-z]\w*_((?=\w*[A-Z])[A-Z0-9hd]+|[hd])", re.ASCII)
_CHECK, _SIZES = "@check", "@sizes"  # names that no source can have

Sizes = dict[str, tuple[int, str]]  # letter -> its size, and where it was found


class WrongLetters(AssertionError):
    """A name that ends in letters, and an array of another shape."""


def letters_of(name: str) -> str:
    """ "BTD" of "x_BTD", "" of a name without such an end."""
    found = SUFFIX.fullmatch(name)
    return found[1] if found else ""


def check(value: Any, name: str, letters: str, file: str, line: int, sizes: Sizes) -> Any:
    """The value itself. WrongLetters if its shape is not one of the letters, given the sizes so far."""
    __tracebackhide__ = True  # pytest ends its traceback at the assignment
    shape = getattr(value, "shape", None)
    if type(shape) is not tuple:
        return value
    if len(shape) != len(letters):
        raise WrongLetters(
            f"{file}:{line}: {name} has {len(shape)} dimensions, shape {shape}; its letters say {len(letters)}"
        )
    for letter, size in zip(letters, shape, strict=True):
        if letter.isdigit():
            known, source = int(letter), "the digit"
        elif size == 1:
            continue
        else:
            known, source = sizes.setdefault(letter, (size, f"{name} in line {line}"))
        if size != known:
            raise WrongLetters(
                f"{file}:{line}: {name} has shape {shape}, {letter}={size}; {letter}={known} by {source}"
            )
    return value


class Checked(ast.NodeTransformer):
    """A file's syntax tree with a call of `check` wherever a name that ends in letters gets a value."""

    def __init__(self, file: str):
        self.file = file
        self.loops = 0

    def _check(self, name: str, at: ast.AST, value: ast.expr | None = None, own: bool = False):
        """The call, as an expression. own: its letters are compared with no other name's."""
        value = value or ast.Name(name, ast.Load())
        sizes = ast.Dict([], []) if own else ast.Name(_SIZES, ast.Load())
        constants = [ast.Constant(x) for x in (name, letters_of(name), self.file, at.lineno)]
        call = ast.Call(ast.Name(_CHECK, ast.Load()), [value, *constants, sizes], [])
        return ast.fix_missing_locations(ast.copy_location(call, at))

    def _checks(self, names: Iterator[str], at: ast.AST) -> list[ast.stmt]:
        found = dict.fromkeys(name for name in names if letters_of(name))
        return [ast.copy_location(ast.Expr(self._check(name, at)), at) for name in found]

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        begin = _statement("sizes = {}", node.body[0], sizes=_SIZES)
        checks = self._checks(_parameters(node.args), node)
        after = 1 if ast.get_docstring(node, clean=False) is not None else 0
        node.body[after:after] = [begin, *checks]
        return node

    def visit_Lambda(self, node):
        self.generic_visit(node)
        names = [name for name in _parameters(node.args) if letters_of(name)]
        if names:
            checks = [self._check(name, node, own=True) for name in names]
            parts = ast.Tuple([*checks, node.body], ast.Load())
            node.body = ast.Subscript(parts, ast.Constant(-1), ast.Load())
            ast.fix_missing_locations(ast.copy_location(node.body, node))
        return node

    def _assigned(self, node):
        self.generic_visit(node)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = (name for target in targets for name in _names(target))
        return [node, *self._checks(names, node)]

    visit_Assign = visit_AugAssign = _assigned

    def visit_AnnAssign(self, node):
        return self._assigned(node) if node.value else node

    def visit_NamedExpr(self, node):
        self.generic_visit(node)
        if letters_of(node.target.id):
            node.value = self._check(node.target.id, node, node.value)
        return node

    def visit_With(self, node):
        self.generic_visit(node)
        targets = [item.optional_vars for item in node.items if item.optional_vars]
        names = (name for target in targets for name in _names(target))
        node.body[:0] = self._checks(names, node)
        return node

    def _looped(self, node):
        self.generic_visit(node)
        names = _names(node.target) if isinstance(node, ast.For) else ()
        self.loops += 1
        before = f"@before{self.loops}"
        keep = _statement("before = dict(sizes)", node, sizes=_SIZES, before=before)
        turn, after = (
            _statement("sizes = dict(before)", node, sizes=_SIZES, before=before) for _ in range(2)
        )
        node.body[:0] = [turn, *self._checks(names, node)]
        return [keep, node, after]

    visit_For = visit_While = _looped

    def visit_comprehension(self, node):
        self.generic_visit(node)
        for name in reversed([name for name in _names(node.target) if letters_of(name)]):
            passed = ast.Tuple([self._check(name, node.target, own=True)], ast.Load())  # true
            node.ifs.insert(0, ast.copy_location(passed, node.target))
        return node


def _names(target: ast.AST) -> Iterator[str]:
    """Names that an assignment to `target` binds; not what stands in an index."""
    match target:
        case ast.Name(name):
            yield name
        case ast.Starred(value):
            yield from _names(value)
        case ast.Tuple(parts) | ast.List(parts):
            for part in parts:
                yield from _names(part)


def _parameters(args: ast.arguments) -> Iterator[str]:
    return (arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs))


def _statement(source: str, at: ast.AST, **names: str) -> ast.stmt:
    """The statement, with other names in it, at the place of `at`."""
    (statement,) = ast.parse(source).body
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
        ast.copy_location(node, at)
    return statement


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles the checked tree, each time: what lies in __pycache__ is neither read nor written."""

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data, path, *, _optimize=-1):
        text = importlib.util.decode_source(data) if isinstance(data, bytes) else data
        tree = ast.parse(text, path)
        return compile(Checked(str(path)).visit(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module):
        module.__dict__.update({_CHECK: check, _SIZES: {}})
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules of a package as Python does, and has those checked that have names with letters."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(f"{self.package}.") or fullname in APART:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            with open(spec.origin, encoding="utf-8") as file:
                names = re.findall(r"\b\w+_\w+\b", file.read())
            if any(map(letters_of, set(names))):
                spec.loader = Loader(fullname, spec.origin)
        return spec


def install(package: str = PACKAGE) -> None:
    """Check what is imported of the package from here on."""
    early = [name for name in sys.modules if name.startswith(f"{package}.")]
    assert not early, f"imported before its letters could be checked: {early}"
    sys.meta_path.insert(0, Finder(package))
