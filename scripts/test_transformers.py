"""Our tests of the transformers interface under other releases of it: `make test-transformers`.

Puts the oldest release that pyproject.toml allows, and the newest, each into .cache/ and runs tests/hf and
the tests of export and generation with it.

    python scripts/test_transformers.py [oldest|newest|VERSION ...] [-- PYTEST ARGUMENTS]
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/hf", "tests/test_export.py", "tests/evaluation/test_generation.py")


def requirement(release: str) -> str:
    """The pip requirement of `release`: the oldest, the newest allowed, or a version."""
    allowed = re.search(r'"transformers(>=([\d.]+),<\d+)"', (ROOT / "pyproject.toml").read_text())
    assert allowed, "pyproject.toml names no range of transformers"
    wanted = {"oldest": f"=={allowed[2]}.*", "newest": allowed[1]}
    return "transformers" + wanted.get(release, f"=={release}")


def hub_requirement(folder: Path) -> str:
    """The huggingface_hub that the transformers in `folder` wants, perhaps not the installed one."""
    (metadata,) = folder.glob("transformers-*.dist-info/METADATA")
    return next(
        line.removeprefix("Requires-Dist: ")
        for line in metadata.read_text(encoding="utf-8").splitlines()
        if re.match("Requires-Dist: huggingface.hub", line) and ";" not in line
    )


def install(folder: Path, package: str) -> None:
    options = ["--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, package], check=True)


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    releases, more = arguments[:cut] or ["oldest", "newest"], arguments[cut + 1 :]
    failed = []
    for release in releases:
        folder = ROOT / ".cache" / f"transformers-{release}"
        install(folder, requirement(release))
        install(folder, hub_requirement(folder))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        show = "import transformers; print('transformers', transformers.__version__, flush=True)"
        subprocess.run([sys.executable, "-c", show], check=True, env=environment)
        tests = ["-m", "pytest", *TESTS, "-q", "-m", "not slow and not gpu and not network", *more]
        if subprocess.run([sys.executable, *tests], env=environment, cwd=ROOT).returncode:
            failed.append(release)
    print(f"failed: {', '.join(failed)}" if failed else "passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
