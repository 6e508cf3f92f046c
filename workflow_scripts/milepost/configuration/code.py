"""Digest the code that a result depends on: its modules' syntax trees, without what can't change a result."""

import ast
import functools
import hashlib
import json
from collections.abc import Collection
from pathlib import Path

# What these packages and modules do decides whether and how a job runs or ends, never what it computes.
# `configuration` is read by the workflow: what it decides is in the record's settings.
NOT_COMPUTING = {
    *("milepost/configuration", "milepost/launch"),
    *(f"milepost/common/{name}.py" for name in ("errors", "files", "interrupts", "loopback", "working_folder")),
}
# Calls whose texts are for people, by the last part of their name. `print` to stderr is one as well.
TELLING = {
    *("UserError", "error", "exit", "say", "tqdm", "warn"),
    *("debug", "info", "warning", "critical", "exception", "add_argument", "ArgumentParser"),
}
TELLING_KEYWORDS = {"help", "description", "desc", "epilog"}


@functools.cache
def code_digest(root: Path, *scripts: str) -> str:
    """Digest ``scripts`` and every module below ``root`` that they import.

    Comments, formatting, docstrings and the texts of errors, messages, logs and help do not count.
    """
    return _digest_of_all(root, [root / script for script in scripts], _WithoutTexts, NOT_COMPUTING)


@functools.cache
def user_code_digest(script: Path) -> str:
    """Digest a user's ``script`` and every module next to it that it imports.

    Comments, formatting and docstrings do not count. Texts do: a judge's prompt is one. A file that can't be parsed
    counts by its bytes.
    """
    return _digest_of_all(script.parent, [script], _WithoutDocstrings)


def _digest_of_all(
    root: Path, waiting: list[Path], reduced: type[ast.NodeTransformer], left_out: Collection[str] = ()
) -> str:
    """Digest of the files in ``waiting`` and of all below ``root`` that they import, without those ``left_out``."""
    trees: dict[Path, str] = {}
    while waiting:
        file = waiting.pop()
        relative = file.relative_to(root)
        if file in trees or {relative.as_posix(), relative.parent.as_posix()} & {*left_out}:
            continue
        trees[file], imported = _read(root, file, reduced)
        waiting += imported
    return digest(sorted((file.relative_to(root).as_posix(), tree) for file, tree in trees.items()))


def digest(value: object) -> str:
    """A short digest of plain JSON that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


@functools.cache
def _read(root: Path, file: Path, reduced: type[ast.NodeTransformer]) -> tuple[str, list[Path]]:
    """Digest one module's syntax tree; also return the files below ``root`` that it imports, with their packages.

    Files in other languages, and files that can't be parsed, are digested byte by byte.
    """
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file)) if file.suffix == ".py" else None
    except (SyntaxError, ValueError):
        tree = None
    if tree is None:
        return hashlib.sha256(file.read_bytes()).hexdigest(), []
    package, names = file.relative_to(root).parent.parts, set()
    for node in ast.walk(tree):  # what is imported inside functions, too
        if isinstance(node, ast.Import):
            names.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            names.update((*module, alias.name) for alias in node.names)  # a module, or a name in the one before
    files = []
    for name in names:
        for depth in range(1, len(name) + 1):
            path = root.joinpath(*name[:depth])
            files += [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return digest(ast.dump(reduced().visit(tree))), files


class _WithoutDocstrings(ast.NodeTransformer):
    """Drops docstrings."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
        return super().generic_visit(node)


class _WithoutTexts(_WithoutDocstrings):
    """Drops docstrings, and empties texts that are written for people."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc.args = [_emptied(argument) for argument in node.exc.args]
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = ast.unparse(node.func).rpartition(".")[2]
        to_stderr = any(
            keyword.arg == "file" and ast.unparse(keyword.value) == "sys.stderr" for keyword in node.keywords
        )
        if name in TELLING or (name == "print" and to_stderr):
            # The first argument of `add_argument` is the argument's name.
            node.args = node.args if name == "add_argument" else [_emptied(argument) for argument in node.args]
        for keyword in node.keywords:
            if keyword.arg in TELLING_KEYWORDS:
                keyword.value = _emptied(keyword.value)
        return self.generic_visit(node)


def _emptied(node: ast.expr) -> ast.expr:
    """Replace a literal text, with all that is formatted into it, by an empty text; keep anything else."""
    parts = [node]
    while parts:
        part = parts.pop()
        if isinstance(part, ast.BinOp):
            parts += [part.left, part.right]
        elif isinstance(part, ast.JoinedStr) or (isinstance(part, ast.Constant) and isinstance(part.value, str)):
            return ast.Constant("")
    return node
