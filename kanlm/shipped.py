"""The configurations that come with kanlm: `kanlm configs` lists and copies them."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from kanlm.config import UserError, did_you_mean, shipped_configs, shipped_folder


def listing(width: int = 110) -> str:
    """One line for each: name, verb, first sentence of the file's comment. Launch configurations follow."""
    configs = shipped_configs()
    longest = max(map(len, configs), default=0)
    lines = []
    for name, path in configs.items():
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
        verb = "study" if "phase" in table else "compare" if "arms" in table else "train"
        line = f"{name:{longest}}  {verb:7}  {first_sentence(text)}"
        lines.append(line if len(line) <= width else line[: width - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}")
    lines += ["", f"for accelerate launch --config_file: {', '.join(launch_configs())}"]
    return "\n".join(lines)


def launch_configs() -> dict[str, Path]:
    """Configurations of `accelerate launch`, named `accelerate/...`."""
    folder = shipped_folder() / "accelerate"
    return {f"accelerate/{path.stem}": path for path in sorted(folder.glob("*.yaml"))}


def first_sentence(text: str) -> str:
    """Of the comment at the top of a TOML file, without its full stop."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].removesuffix(".")


def copy(name: str, directory: str | Path = ".") -> Path:
    """Write the shipped configuration `name` into `directory`, which is made where it is missing.

    Raises:
        UserError: no such name, or the file exists there.
    """
    known = shipped_configs() | launch_configs()
    if name not in known:
        raise UserError(
            f"configs: kanlm comes with no configuration {name!r}; {did_you_mean(name, list(known))}"
        )
    target = Path(directory) / known[name].name
    if target.exists():
        raise UserError(f"{target}: exists already; delete it, or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(known[name], target))
