"""A page that runs an exported model in a browser: index.html beside the graphs, libraries in web/.

The libraries come from the npm registry when the page is made; reading it fetches nothing from elsewhere.
Legend: P points, C channels, O outputs, I inputs, K basis functions.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kanlm.config import UserError, one_line

LIBRARIES = {
    "onnxruntime-web@1.30.0": (
        "dist/ort.wasm.min.mjs",
        "dist/ort-wasm-simd-threaded.mjs",
        "dist/ort-wasm-simd-threaded.wasm",
    ),
    "@huggingface/tokenizers@0.2.0": ("dist/tokenizers.min.mjs",),
}
TEMPLATE = Path(__file__).parent / "templates" / "page.html"
DRAWN, POINTS = 12, 81


def add_page(folder: Path, model: nn.Module, title: str) -> None:
    """Write index.html into the `folder` of ONNX files of `model`, where `vendor` has written web/."""
    graphs = sorted(path.name for path in folder.glob("*.onnx"))
    facts = {"title": title, "graphs": graphs, "layers": curves(model)}
    embedded = json.dumps(facts).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("__FACTS__", embedded)
    (folder / "index.html").write_text(page, encoding="utf-8")


def vendor(web: Path) -> None:
    """The files of LIBRARIES in the new folder `web`.

    Raises:
        UserError: npm is missing or cannot fetch them.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm: not installed, and --page takes its libraries from it; install Node.js")
    web.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        for package, files in LIBRARIES.items():
            done = subprocess.run(
                [npm, "pack", package, "--silent", "--pack-destination", scratch],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise UserError(f"npm: cannot fetch {package}: {one_line(RuntimeError(done.stderr))[:200]}")
            archive = Path(scratch) / done.stdout.split()[-1]
            with tarfile.open(archive) as packed:
                for name in files:
                    member = packed.extractfile(f"package/{name}")
                    assert member is not None
                    (web / Path(name).name).write_bytes(member.read())


@torch.no_grad()
def curves(model: nn.Module) -> list[dict[str, Any]]:
    """For each module of learned functions: name, x [P] and the values of up to DRAWN of them."""
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "LearnedFunction":
            x, ys = channel_curves(module)
        elif kind == "KANLinear":
            x, ys = edge_curves(module)
        else:
            continue
        rounded = [[round(value, 4) for value in y] for y in ys.tolist()]
        found.append({"name": name, "x": [round(value, 4) for value in x.tolist()], "ys": rounded})
    return found


def grid(module: Any) -> torch.Tensor:
    """Points [P] over the grid and a quarter of it on either side."""
    low, high = module.basis.grid_min, module.basis.grid_max
    margin = (high - low) / 4
    return torch.linspace(low - margin, high + margin, POINTS)


def channel_curves(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = grid(module)
    values = module.reference(x.unsqueeze(-1).expand(-1, module.channels).contiguous(), None)  # [P, C]
    return x, values[:, :: module.channels // module.groups].t()[:DRAWN]


def edge_curves(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges with the largest coefficients."""
    x = grid(module)
    weight = module.plain_weight().unflatten(-1, (-1, module.in_features))  # [O, K, I]
    strongest = weight.square().sum(1).flatten().topk(min(DRAWN, weight[:, 0].numel())).indices
    rows, columns = strongest // module.in_features, strongest % module.in_features
    values = weight[rows, :, columns] @ module.basis.values(x.unsqueeze(-1)).squeeze(-1).t()  # [n, P]
    if module.base is not None:
        values = values + module.base.weight[rows, columns].unsqueeze(-1) * nn.functional.silu(x)
    return x, values
