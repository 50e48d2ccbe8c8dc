"""The floors of docs/architecture.md: a package imports only from lower floors, the capsule from none."""

import ast
import subprocess
import sys
from pathlib import Path

import kanlm

ROOT = Path(kanlm.__file__).parent
FLOORS = {
    "config": 0,
    "runs": 0,
    "metrics": 0,
    "stats": 0,
    "shipped": 1,
    "model": 1,
    "timing": 1,
    "trust": 1,
    "checksums": 1,
    "data": 2,
    "kernels": 2,
    "edge": 2,
    "initial": 2,
    "fitting": 2,
    "sizing": 3,
    "evaluation": 3,
    "train": 4,
    "export": 5,
    "interpret": 4,
    "bench": 6,
    "compare": 7,
    "prune": 6,
    "convert": 6,
    "hub": 8,
    "study": 8,
    "cli": 9,
    "__main__": 10,
    "auto_classes": 10,
    "__init__": 11,
}
CAPSULE = {
    "configuration_kanlm",
    "basis",
    "whitening",
    "learned_function",
    "kan",
    "ffn",
    "ffn_kan",
    "modeling_converted",
    "modeling_kanlm",
}
WITHOUT_TORCH = (
    "kanlm",
    "kanlm.config",
    "kanlm.runs",
    "kanlm.metrics",
    "kanlm.stats",
    "kanlm.cli",
    "kanlm.train.status",
    "kanlm.compare.report",
)


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that `path` imports, at any depth of the file."""
    found = set()
    here = ["kanlm", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "kanlm" else {module}
    return found


def sources() -> list[Path]:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 20
    return files


def test_every_file_has_a_floor():
    assert {package_of(path) for path in sources()} <= set(FLOORS)


def test_packages_import_only_from_lower_floors():
    wrong = []
    for path in sources():
        own = package_of(path)
        for name in imports(path):
            if not name.startswith("kanlm."):
                continue
            other = name.split(".")[1]
            if other == "__version__" or other == own:
                continue
            if FLOORS[other] >= FLOORS[own]:
                wrong.append(
                    f"{path.relative_to(ROOT)} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})"
                )
    assert not wrong, "\n".join(wrong)


def test_capsule_is_flat_and_imports_only_its_siblings_torch_and_transformers():
    folder = ROOT / "model"
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {path.stem for path in folder.glob("*.py")} == CAPSULE | {"__init__"}
    allowed = {
        "torch",
        "transformers",
        "huggingface_hub",
        "math",
        "sys",
        "types",
        "typing",
        "dataclasses",
        "difflib",
        "collections",
        "contextlib",
        "hashlib",
        "importlib",
        "__future__",
    }
    for name in CAPSULE:
        for module in imports(folder / f"{name}.py"):
            sibling = module.removeprefix("kanlm.model.")
            assert module.split(".")[0] in allowed or sibling in CAPSULE, f"{name}.py imports {module}"


def test_what_judges_and_tells_imports_no_torch():
    program = f"""
import importlib, sys
for name in {WITHOUT_TORCH}:
    importlib.import_module(name)
    print(name, {{"torch", "transformers"}} & set(sys.modules) or "")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(WITHOUT_TORCH)


def test_the_walk_sees_a_wrong_import(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ffn.py").write_text(
        "def f():\n    from kanlm.train import loop\n    from .kan import x\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imports(tmp_path / "model" / "ffn.py") == {"kanlm.train", "kanlm.model.kan"}
