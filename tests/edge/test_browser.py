"""The page runs the model in headless Chromium: the greedy tokens are those of ONNX Runtime here."""

import functools
import http.server
import re
import shutil
import subprocess
import threading

import pytest
import torch

from kanlm.config import UserError
from kanlm.edge import browser, onnx_export
from kanlm.edge.runtime import OnnxModel, sampler
from kanlm.model.kan import KANLinear
from kanlm.model.learned_function import LearnedFunction

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")
def test_page_streams_the_model_s_text(onnx_of, tmp_path):
    model, folder = onnx_of("kan")
    site = tmp_path / "site"
    shutil.copytree(folder, site)
    try:
        browser.vendor(site / "web")
        browser.add_page(site, model, "tiny kan")
    except UserError as error:
        pytest.skip(str(error))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for graph in ("model.onnx", "model_int8.onnx"):
            where = f"http://127.0.0.1:{server.server_port}/index.html"
            page = subprocess.run(
                [
                    str(CHROMIUM),
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    f"--user-data-dir={tmp_path / graph}",
                    "--virtual-time-budget=120000",
                    "--dump-dom",
                    f"{where}#prompt=old%20cats&count=12&temperature=0&graph={graph}",
                ],
                capture_output=True,
                text=True,
                timeout=500,
            ).stdout
            session = OnnxModel(folder / graph, threads=1)
            prompt = session.tokenizer.encode("old cats", add_special_tokens=False).ids
            expected = prompt + list(session.tokens(prompt, 12, sampler(0.0, 0, 0)))
            done = re.search(r'data-done="([\d ]+)"', page)
            assert done, page[-1500:]
            assert [int(token) for token in done[1].split()] == expected
            assert len(re.findall(r'<polyline points="[-\d]', page)) == browser.DRAWN
            said = re.search(r'role="status">(\d+) tokens', page)
            assert said and int(said[1]) == len(expected) - len(prompt), page[-1500:]
    finally:
        server.shutdown()


def test_curves_are_the_functions_of_the_model(build_tiny):
    function, edges = LearnedFunction(6, 3), KANLinear(1, 1)
    found = browser.curves(torch.nn.Sequential(function, edges))
    assert [layer["name"] for layer in found] == ["0", "1"] and len(found[0]["ys"]) == 3
    x = torch.tensor(found[0]["x"])
    with torch.no_grad():
        expected = function(x.unsqueeze(-1).expand(-1, 6).contiguous())[:, 0]
        torch.testing.assert_close(torch.tensor(found[0]["ys"][0]), expected, atol=1e-3, rtol=1e-3)
        x = torch.tensor(found[1]["x"]).unsqueeze(-1)
        torch.testing.assert_close(torch.tensor(found[1]["ys"]).t(), edges(x), atol=1e-3, rtol=1e-3)
    assert browser.curves(build_tiny("gelu")) == []


def test_missing_npm_is_one_line_before_anything_is_traced(build_tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    monkeypatch.setattr(onnx_export, "graph", lambda model: pytest.fail("traced"))
    with pytest.raises(UserError, match="npm: not installed"):
        onnx_export.write_onnx(build_tiny("gelu"), tokenizer, tmp_path / "onnx", False, page_title="page")
    assert not list(tmp_path.iterdir())
