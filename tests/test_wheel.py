"""The wheel and the sdist, used from an empty folder in an environment of their own."""

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = (
    "model.hidden_size=32 model.num_hidden_layers=1 model.num_attention_heads=2 model.intermediate_size=64 "
    "tokenizer.vocab_size=300 data.block_size=128 train.max_tokens=4096 train.batch_size=4"
).split()


def run(words: list[str], folder: Path, seconds: int = 1800) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    return out


def fresh_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def use(python: Path, folder: Path) -> None:
    """What a new user does: list, copy, compare, train on own text, export, evaluate, generate."""
    kanlm = [str(python), "-m", "kanlm"]
    where = run([str(python), "-c", "import kanlm; print(kanlm.__file__)"], folder)
    assert str(ROOT) not in where and "site-packages" in where
    assert "tiny-kan_grouped" in run([*kanlm, "configs"], folder)
    run([*kanlm, "configs", "copy", "tiny-kan_grouped"], folder)
    (folder / "my.txt").write_text((ROOT / "docs/architecture.md").read_text(encoding="utf-8") * 8)
    launch = [str(python), "-m", "accelerate.commands.launch", "-m", "kanlm", "train"]
    run([*launch, "tiny-kan_grouped", "data.source=my.txt", *SMALL], folder)
    run([*kanlm, "export", "runs/tiny-kan_grouped"], folder)
    model = "runs/tiny-kan_grouped/hf"
    assert "bits" in run([*kanlm, "eval", model, "--data", "runs/tiny-kan_grouped"], folder)
    run([*kanlm, "generate", model, "--prompt", "The", "--max-new-tokens", "4"], folder)
    tiny = ["base.train.max_tokens=8192", "base.data.max_documents=60", "base.tokenizer.vocab_size=300"]
    run([*kanlm, "compare", "smoke", *tiny], folder)
    assert (folder / "runs/smoke/report.html").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_archives_hold_what_users_need_and_no_more(dist):
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "kanlm", "configs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {name.replace("configs/", "kanlm/configs/", 1) if name[0] == "c" else name for name in tracked}
    assert {name for name in names if ".dist-info/" not in name} == expected
    with tarfile.open(sdist) as archive:
        tops = {name.split("/", 2)[1] for name in archive.getnames() if "/" in name}
    assert {"kanlm", "configs", "docs", "tests", "scripts", "README.md", "LICENSE", "CITATION.cff"} <= tops
    assert not {"runs", ".venv", ".ci", "site"} & tops


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_wheel_serves_from_an_empty_folder(dist, tmp_path):
    """Dependencies are those of this environment; kanlm itself is the wheel's."""
    python = fresh_environment(tmp_path / "environment")
    (wheel,) = dist.glob("*.whl")
    run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], tmp_path)
    packages = run([str(python), "-c", "import site; print(site.getsitepackages()[0])"], tmp_path).strip()
    # A plain path: the editable install of the checkout among them does not come along.
    (Path(packages) / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    use(python, folder)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.network
@pytest.mark.timeout(7200)
def test_the_wheel_brings_its_dependencies(dist, tmp_path):
    """At the pinned versions, from the package index."""
    python = fresh_environment(tmp_path / "environment")
    (wheel,) = dist.glob("*.whl")
    pins = ["-c", str(ROOT / "constraints.txt")]
    run([str(python), "-m", "pip", "install", "--quiet", *pins, str(wheel)], tmp_path, seconds=3600)
    folder = tmp_path / "empty"
    folder.mkdir()
    use(python, folder)
