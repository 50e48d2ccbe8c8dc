"""The configurations that come with kanlm: listed, copied, taken by name; and one version everywhere."""

import tomllib
from pathlib import Path

import pytest

import kanlm
from kanlm import config, shipped
from kanlm.compare.schema import load_compare_config
from kanlm.config import UserError, load_run_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_configuration_is_listed_in_one_line_that_fits():
    lines = shipped.listing().splitlines()
    names = [line.split()[0] for line in lines[: lines.index("")]]
    assert names == sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
    assert all(20 < len(line) <= 110 for line in lines[: lines.index("")])
    assert "accelerate/8-gpus-ddp" in lines[-1]
    verbs = {name: line.split()[1] for name, line in zip(names, lines, strict=False)}
    assert verbs["study"] == "study" and verbs["demo"] == "compare" and verbs["tiny-kan"] == "train"


def test_names_serve_as_paths_do():
    assert load_run_config("tiny-kan_glu", ["seed=3"]).seed == 3
    assert load_compare_config("demo").name == "demo"


def test_a_file_comes_before_a_shipped_name(tmp_path):
    Path("smoke").write_text('name = "mine"\nmodel = {}\n[train]\nmax_tokens = 1\n')
    assert load_run_config("smoke").name == "mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny-kan_grouped_", ["tiny-kan_grouped_", "kanlm comes with tiny-kan_grouped"]),
        ("configs/tiny-kan.toml", ["'tiny-kan' alone"]),
        ("qqqq.toml", ["`kanlm configs` lists"]),
        ("demo", ["a comparison, not one run", "kanlm compare demo"]),
        ("study", ["the plan of a study", "kanlm study run"]),
    ],
)
def test_an_unknown_name_is_told_in_one_line(name, words):
    with pytest.raises(UserError) as error:
        load_run_config(name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_copy_is_the_same_file_and_never_replaces_one(tmp_path):
    written = shipped.copy("tiny-kan", "new/folder")
    assert written.read_bytes() == (ROOT / "configs/tiny-kan.toml").read_bytes()
    assert shipped.copy("accelerate/8-gpus-ddp").name == "8-gpus-ddp.yaml"
    with pytest.raises(UserError, match="exists already"):
        shipped.copy("tiny-kan", "new/folder")
    with pytest.raises(UserError, match="did you mean 'tiny-kan'"):
        shipped.copy("tiny-kam", "other")
    assert not Path("other").exists()


def test_an_installed_package_has_its_own_configurations(tmp_path, monkeypatch):
    """As the wheel lays them out."""
    (tmp_path / "kanlm" / "configs").mkdir(parents=True)
    (tmp_path / "kanlm" / "configs" / "mine.toml").write_text("# A sentence. Another.\n")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "kanlm" / "config.py"))
    assert list(config.shipped_configs()) == ["mine"]
    assert (
        shipped.first_sentence("# A sentence over\n# two lines. Another.\nx = 1\n")
        == "A sentence over two lines"
    )


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "kanlm/__init__.py"
    assert f"version: {kanlm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_range_has_a_pinned_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    extras = project["optional-dependencies"]
    assert set(extras) >= {"onnx", "track", "bench", "dev"}
    for extra in ("onnx", "track", "docs"):
        for requirement in extras[extra]:
            name = requirement.partition(">")[0].partition("[")[0].lower().replace("_", "-")
            assert f"\n{name}==" in pinned, name
