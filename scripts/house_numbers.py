"""How far a reader has to walk: lines of the capsule, files of a training step, returns of `config`.

    python scripts/house_numbers.py [FILE:FUNCTION:PARAMETER ...] [--step FILE:FUNCTION]

Method, by `ast` alone; nothing is run. The walk starts in a function and reads its body in the order of the
text. A call is followed, in depth, where its name can be resolved: a function or class of the same file, or
one that is imported from kanlm, also as `module.function`; of a class its `__init__`. The walk of a parameter
follows only calls with an argument that holds the parameter or a variable that was assigned from it. Each
function is entered once. A return is a step into a file that the walk has been in before and has left since.
Methods of objects, and functions handed over as values, are not followed, so the numbers are lower bounds.
Each walk is taken twice: through all of kanlm, and within the package that it starts in, where what other
packages give is known by its docstring.
An exported model takes along modeling_kanlm.py and what that imports.
The files of a step are those of all functions that are reached in this way from `one_step` and from the two
entries that it reaches through objects, the loader's and the model's.
"""

from __future__ import annotations

import argparse
import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WALKS = ("kanlm/train/loop.py:train:config", "kanlm/compare/comparison.py:compare:toml_path")
STEP = (
    "kanlm/train/step.py:one_step",
    "kanlm/data/loader.py:TokenLoader.__iter__",
    "kanlm/model/modeling_kanlm.py:KanLMForCausalLM.forward",
)


class Module:
    """What a file defines and imports."""

    def __init__(self, path: Path):
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.defined: dict[str, ast.FunctionDef | ast.ClassDef] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defined[node.name] = node
            if isinstance(node, ast.ClassDef):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
                self.defined |= {f"{node.name}.{method.name}": method for method in methods}
        self.imported: dict[str, tuple[str, str]] = {}
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (
                node.level == 1 or (node.module or "").startswith("kanlm")
            ):
                base = f"{package}.{node.module}" if node.level else str(node.module)
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = base, alias.name


@cache
def module_at(path: Path) -> Module:
    return Module(path)


def file_of(dotted: str) -> Path | None:
    path = ROOT.joinpath(*dotted.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def definition(module: Module, name: str) -> tuple[Module, str] | None:
    """Where `name`, as `module` uses it, is defined; None outside kanlm."""
    head, _, rest = name.partition(".")
    if name in module.defined:
        found = module.defined[name]
        constructor = f"{name}.__init__"
        return module, constructor if isinstance(
            found, ast.ClassDef
        ) and constructor in module.defined else name
    if head not in module.imported:
        return None
    base, original = module.imported[head]
    if (inner := file_of(f"{base}.{original}")) is not None:  # a module
        return definition(module_at(inner), rest) if rest else None
    path = file_of(base)
    return definition(module_at(path), f"{original}.{rest}" if rest else original) if path else None


def names_in(node: ast.AST) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}


class Walk:
    """The files entered, in order."""

    def __init__(self, follow_all: bool, package: Path | None = None):
        self.follow_all, self.package = follow_all, package
        self.files: list[Path] = []
        self.entered: set[tuple[Path, str]] = set()

    def enter(self, module: Module, name: str, carriers: set[str]) -> None:
        function = module.defined[name]
        if (module.path, name) in self.entered:
            return
        self.entered.add((module.path, name))
        if not self.files or self.files[-1] != module.path:
            self.files.append(module.path)
        if isinstance(function, ast.ClassDef):
            return
        for statement in function.body:
            self.visit(module, statement, carriers)

    def visit(self, module: Module, node: ast.AST, carriers: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            self.visit(module, child, carriers)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and names_in(node.value) & carriers:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                carriers |= {item.id for item in ast.walk(target) if isinstance(item, ast.Name)}
        if not isinstance(node, ast.Call):
            return
        found = definition(module, ast.unparse(node.func))
        if found is None:
            return
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        carried = [bool(names_in(value) & carriers) for value in values]
        if not (any(carried) or self.follow_all):
            return
        callee, name = found
        if self.package is not None and callee.path.parent != self.package:
            return
        function = callee.defined[name]
        parameters: set[str] = set()
        if isinstance(function, ast.FunctionDef):
            names = [argument.arg for argument in function.args.args]
            names = names[1:] if names[:1] == ["self"] else names
            given = [*names[: len(node.args)], *(keyword.arg for keyword in node.keywords)]
            parameters = {key for key, carries in zip(given, carried, strict=False) if key and carries}
        self.enter(callee, name, parameters)

    @property
    def returns(self) -> int:
        return len(self.files) - len(set(self.files))


def taken_along(model: Path) -> set[Path]:
    """The files of the capsule that an exported model has beside its weights: `model` and what it imports."""
    files: set[Path] = set()
    new = {model}
    while new:
        files |= new
        names = {base.rpartition(".")[2] for path in new for base, _ in module_at(path).imported.values()}
        new = {model.with_name(f"{name}.py") for name in names} - files
    return files


def start(walk: Walk, entry: str) -> Walk:
    path, name, *parameter = entry.split(":")
    walk.enter(module_at(ROOT / path), name, set(parameter))
    return walk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("walk", nargs="*", help="FILE:FUNCTION:PARAMETER")
    parser.add_argument("--step", action="append", help="FILE:FUNCTION; may be repeated")
    arguments = parser.parse_args()
    lines = {path: len(path.read_text().splitlines()) for path in sorted((ROOT / "kanlm/model").glob("*.py"))}
    print(f"capsule: {sum(lines.values()):,} lines in {len(lines)} files")
    exported = taken_along(ROOT / "kanlm/model/modeling_kanlm.py")
    print(f"exported with a model: {sum(lines[path] for path in exported):,} lines in {len(exported)} files")
    step = Walk(follow_all=True)
    for entry in arguments.step or STEP:
        start(step, entry)
    files = sorted({str(path.relative_to(ROOT)) for path in step.files})
    print(f"one training step: {len(files)} files: {', '.join(files)}")
    for entry in arguments.walk or WALKS:
        package = (ROOT / entry.split(":")[0]).parent
        for where, walk in (("its package", Walk(False, package)), ("kanlm", Walk(False))):
            start(walk, entry)
            stays, files = len(walk.files), len(set(walk.files))
            print(f"walk of {entry} in {where}: {stays} stays, {files} files, {walk.returns} returns")


if __name__ == "__main__":
    main()
