"""transformers' own tests of a model, run on kanlm's classes: `make test-hf`.

Gets the source distribution of the installed transformers from the package registry into .cache/, puts its
test files beside our model test (scripts/hf_suite/), runs them for some arms, and prints what passed and
why the rest was skipped. The source distribution holds the common tests, but not tests/generation,
tests/exporters and tests/utils: those mixins are empty here, and tests/hf covers generation and export.
torchao, which prints to stderr whenever transformers is imported, is not in the environment: it is put into
.cache/ too, for the suite's test of it and for ours.

    python scripts/test_hf.py [--arms kan kan_glu swiglu kan_act_norm] [--no-distributed] [PYTEST ARGUMENTS]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "scripts" / "hf_suite"
ARMS = ("kan", "kan_glu", "swiglu", "kan_act_norm", "kan_product_norm")
DISTRIBUTED = "fsdp or hsdp or test_tp_"
LEFT_OUT = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
FEWEST_PASSED = 100


def source_archive(version: str, cache: Path) -> Path:
    """The source distribution of transformers `version`, downloaded once."""
    path = cache / f"transformers-{version}.tar.gz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = ["--no-deps", "--no-binary", "transformers", f"transformers=={version}"]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "-d", str(cache), *wanted], check=True
        )
    return path


def torchao(cache: Path) -> Path:
    """A folder to import torchao from, of the version in constraints.txt, downloaded once."""
    path = cache / "torchao"
    if not path.is_dir():
        wanted = ["--no-deps", "--target", str(path), "-c", str(ROOT / "constraints.txt"), "torchao"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return path


def test_tree(version: str, cache: Path) -> Path:
    """A folder with the release's tests, what they lack, and our model test; made anew."""
    tree = cache / f"hf-suite-{version}"
    shutil.rmtree(tree, ignore_errors=True)
    prefix = f"transformers-{version}/tests/"
    with tarfile.open(source_archive(version, cache)) as archive:
        members = [member for member in archive.getmembers() if member.name.startswith(prefix)]
        for member in members:
            member.name = member.name.removeprefix(f"transformers-{version}/")
        archive.extractall(tree, members, filter="data")
    for name, text in LEFT_OUT.items():
        if (tree / "tests" / name).exists():  # a release that ships it: use it
            continue
        (tree / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "tests" / name).write_text(text)
    shutil.copy(OURS / "distributed_testing_utils.py", tree / "tests")
    ours = tree / "tests" / "models" / "kanlm"
    ours.mkdir(parents=True)
    shutil.copy(OURS / "test_modeling_kanlm.py", ours)
    for folder in [tree / "tests", *(path for path in (tree / "tests").rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    (tree / "src").mkdir()
    (tree / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    return tree


def run_arm(arm: str, tree: Path, arguments: list[str]) -> list[tuple[str, str, str]]:
    """(test, outcome, reason) of every test of `arm`."""
    report = tree / f"{arm}.xml"
    environment = os.environ | {
        "KANLM_SUITE_ARM": arm,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RUN_SLOW": "1",
        "RUN_TRAINING_TESTS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tree), str(torchao(tree.parent))]),
    }
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "tests/models/kanlm", "-q"]
    command += [
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--timeout=600",
        "-n",
        "2",
        f"--junitxml={report}",
        *arguments,
    ]
    done = subprocess.run(command, cwd=tree, env=environment)
    if not report.is_file():
        sys.exit(f"{arm}: pytest stopped with status {done.returncode} before it ran a test")
    outcomes = []
    for case in ElementTree.parse(report).iter("testcase"):
        found = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"failure": "failed", "error": "failed"}.get(found[0].tag, "skipped") if found else "passed"
        outcomes.append(
            (case.get("name"), outcome, " ".join(found[0].get("message", "").split()) if found else "")
        )
    return outcomes


def our_torchao_tests(cache: Path) -> bool:
    """Whether our tests of quantised models pass, which tests/hf skips where torchao is not installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(torchao(cache))])}
    command = [sys.executable, "-m", "pytest", "tests/hf/test_hf_tools.py", "-q", "-W", "ignore"]
    return not subprocess.run([*command, "-k", "torchao"], cwd=ROOT, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument(
        "--no-distributed", action="store_true", help="leave out the tensor-parallel and FSDP tests"
    )
    options, arguments = parser.parse_known_args()
    if options.no_distributed:
        arguments += ["-k", f"not ({DISTRIBUTED})"]
    version = transformers.__version__
    tree = test_tree(version, ROOT / ".cache")
    results = {arm: run_arm(arm, tree, arguments) for arm in options.arms}

    print(f"\ntransformers {version}: its model tests on kanlm's classes\n")
    skipped: dict[str, set[str]] = {}
    good = our_torchao_tests(ROOT / ".cache")
    for arm, outcomes in results.items():
        counts = Counter(outcome for _, outcome, _ in outcomes)
        print(f"{arm:10} {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
        good &= not counts["failed"] and (counts["passed"] >= FEWEST_PASSED or bool(arguments))
        for name, outcome, reason in outcomes:
            if outcome == "skipped":
                skipped.setdefault(reason, set()).add(name)
    print("\nSkipped, and why:")
    for reason, names in sorted(skipped.items(), key=lambda item: -len(item[1])):
        print(f"- {reason}: {', '.join(sorted(names))}")
    total = Counter(outcome for outcomes in results.values() for _, outcome, _ in outcomes)
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    sys.exit(not good)


if __name__ == "__main__":
    main()
