# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import inspect
import sys
from importlib.util import resolve_name
from types import ModuleType
from typing import Any


HEADER = """# SPDX-License-Identifier: Apache-2.0
# What {name} needs of {package}, so that it can be loaded without that package.
"""


def bundle_source(bundled_class: type) -> str:
    r"""
    The code of a class as one module that imports nothing of its package: the modules that it needs, each after those
    that it imports itself. One file, since diffusers copies no more than the files that the first one imports into a
    folder that all repositories share.

    Args:
        bundled_class (`type`): A class at the top of a module of a package.

    Returns:
        `str`: The code. That of a module without relative imports is given as it is.

    Raises:
        ValueError: If the source of a module is not there, or two modules mean different things by one name.
    """
    modules: dict[str, tuple[ModuleType, ast.Module, str]] = {}
    _collect(sys.modules[bundled_class.__module__], modules)
    if len(modules) == 1:
        _, _, source = modules.popitem()[1]
        return source
    _check_names([module for module, _, _ in modules.values()], [tree for _, tree, _ in modules.values()])
    package = sys.modules[bundled_class.__module__.partition(".")[0]]
    parts = [HEADER.format(name=bundled_class.__name__, package=f"{package.__name__} {package.__version__}")]
    for name, (module, tree, source) in modules.items():
        parts.append(f"# {name}\n{_without_relative_imports(source, tree, module)}")
    return "\n\n".join(parts)


def _collect(module: ModuleType, modules: dict[str, tuple[ModuleType, ast.Module, str]]) -> None:
    """Add a module, its syntax tree and its source behind those that it imports."""
    if module.__name__ in modules:
        return
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise ValueError(f"The source of {module.__name__} is not there, so it cannot be written: {error}.") from error
    tree = ast.parse(source)
    for node in _relative_imports(tree):
        for alias in node.names:
            _collect(_origin(node, alias.name, module), modules)
    modules[module.__name__] = (module, tree, source)


def _relative_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]


def _origin(node: ast.ImportFrom, name: str, module: ModuleType) -> ModuleType:
    """The module that defines what another imports relatively, behind packages that only hand it on."""
    imported = importlib.import_module(resolve_name("." * node.level + (node.module or ""), module.__package__))
    while hasattr(imported, "__path__"):
        handed_on = [
            inner
            for inner in _relative_imports(ast.parse(inspect.getsource(imported)))
            if name in (alias.name for alias in inner.names)
        ]
        if not handed_on:
            raise ValueError(f"{module.__name__} imports {name} of {imported.__name__}, which is no plain module.")
        package, inner = imported, handed_on[0]
        imported = importlib.import_module(resolve_name("." * inner.level + inner.module, package.__package__))
    return imported


def _without_relative_imports(source: str, tree: ast.Module, module: ModuleType) -> str:
    """The source with what it imports relatively taken from above, and without the line on its licence."""
    lines = source.splitlines()
    for node in _relative_imports(tree):
        renamed = [f"{alias.asname} = {alias.name}" for alias in node.names if alias.asname]
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        if renamed or node not in tree.body:
            lines[node.lineno - 1] = " " * node.col_offset + ("; ".join(renamed) or "pass")
    if (lines[0] or "").startswith("# SPDX"):
        lines[0] = None
    return "\n".join(line for line in lines if line is not None).strip() + "\n"


def _check_names(modules: list[ModuleType], trees: list[ast.Module]) -> None:
    """Raises `ValueError` if modules cannot share one namespace."""
    bound: dict[str, tuple[str, Any, str | None]] = {}
    for module, tree in zip(modules, trees):
        assigned = {
            target.id: ast.dump(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for name, value in vars(module).items():
            if name.startswith("__"):
                continue
            other, other_value, other_assigned = bound.setdefault(name, (module.__name__, value, assigned.get(name)))
            same = value is other_value or (name in assigned and assigned[name] == other_assigned)
            if not same:
                raise ValueError(
                    f"{name} is one thing in {other} and another in {module.__name__}, which cannot stand in one file."
                )
