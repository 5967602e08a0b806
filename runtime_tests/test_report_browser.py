"""The pages in a browser: no error in its console, nothing loaded, no label over another, no sideways scrolling."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from export.report import comparison, page
from runtime_tests.reports import manifest, report, spoil

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
WIDTHS = {"desk": 1100, "phone": 500}
"""Of the window in pixels; ordinary Chromium makes none below 500."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser on PATH ({', '.join(BROWSERS)}); docs/CONTRIBUTING.md says how to get one"
    ),
]

MEASURE = """<script>
const rectangles = [...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('text')].map(text => {
  const box = text.getBoundingClientRect();
  return {text: text.textContent, left: box.left, right: box.right, top: box.top, bottom: box.bottom};
}).concat([Object.assign({text: null}, svg.getBoundingClientRect().toJSON())]));
const root = document.documentElement;
const found = {rectangles: rectangles, width: root.scrollWidth, window: window.innerWidth,
  background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color};
const place = document.createElement('pre');
place.id = 'measured';
place.textContent = JSON.stringify(found);
document.body.append(place);
</script>"""
"""What a page is measured by. The page's own policy forbids scripts, so it is taken out of a copy first."""


def browse(path: Path, *options: str) -> tuple[str, list[str]]:
    """The document as the browser built it, and what its console said."""
    assert BROWSER is not None
    profile = path.parent / "profile"
    words = ["--headless", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}", "--dump-dom"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        words.append("--no-sandbox")  # Chromium refuses its sandbox to root
    command = [BROWSER, *words, *options, path.absolute().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measure(text: str, folder: Path, width: int, *options: str) -> dict[str, Any]:
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", f"{MEASURE}</body>")
    file = folder / "copy.html"
    file.write_text(copy, encoding="utf-8")
    document, _ = browse(file, f"--window-size={width},900", *options)
    found = re.search(r'<pre id="measured">(.*?)</pre>', document, re.DOTALL)
    assert found is not None, "the script ran"
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def collisions(measured: dict[str, Any]) -> list[str]:
    """Labels of one drawing that cover each other by more than a pixel, or that leave the drawing."""
    found = []
    for *labels, drawing in measured["rectangles"]:
        for place, a in enumerate(labels):
            for b in labels[place + 1 :]:
                wide = min(a["right"], b["right"]) - max(a["left"], b["left"])
                high = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
                if wide > 1 and high > 1:
                    found.append(f"{a['text']!r} and {b['text']!r}")
            inside = drawing["left"] - 1 <= a["left"] and a["right"] <= drawing["right"] + 1
            if not inside or a["top"] < drawing["top"] - 1 or a["bottom"] > drawing["bottom"] + 1:
                found.append(f"{a['text']!r} leaves its drawing")
    return found


@functools.cache
def pages() -> dict[str, str]:
    """A model of 32 layers, one of 24 that failed, an emulation, and three bundles with a long name among them."""
    failing = report(24, seed=1)
    spoil(failing, "L3.kl_mean", 0.4)
    emulated = report(seed=2, measured="emulated")
    described = [manifest(), manifest(24, "executorch-files"), manifest(golden="coreml-stages")]
    reports = [report(), failing, emulated]
    names = ["qwen3.5-4b-onnx-int4", "qwen3.5-4b-executorch-int4-of-a-fine-tune-with-a-long-name", "coreml"]
    columns = [comparison.Column(n, Path(), m, r) for n, m, r in zip(names, described, reports, strict=True)]
    return {
        "32 layers": page.render(described[0], reports[0]),
        "failed": page.render(described[1], reports[1]),
        "emulated": page.render(described[2], reports[2]),
        "three": comparison.render(columns),
    }


@pytest.mark.parametrize("name", ["32 layers", "failed", "emulated", "three"])
def test_the_browser_has_nothing_to_object_to(name: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(pages()[name], encoding="utf-8")
    document, console = browse(file)
    assert console == []
    assert "<main>" in document


@pytest.mark.parametrize("width", list(WIDTHS))
@pytest.mark.parametrize("name", ["32 layers", "failed", "emulated", "three"])
def test_no_label_covers_another_and_the_page_fits(name: str, width: str, tmp_path: Path) -> None:
    found = measure(pages()[name], tmp_path, WIDTHS[width])
    assert sum(len(labels) for labels in found["rectangles"]) > 40
    assert collisions(found) == []
    assert found["width"] <= found["window"], "only tables and plots scroll sideways, each for itself"


def test_the_page_turns_dark_with_its_reader(tmp_path: Path) -> None:
    light = measure(pages()["failed"], tmp_path, 1100)
    dark = measure(pages()["failed"], tmp_path, 1100, "--blink-settings=preferredColorScheme=0")
    assert (light["background"], dark["background"]) == ("rgb(255, 255, 255)", "rgb(20, 24, 30)")
    assert light["ink"] != dark["ink"]


def test_what_would_be_wrong_is_found(tmp_path: Path) -> None:
    """A script that the policy forbids, a page wider than the window, labels over each other and outside."""
    spoiled = pages()["failed"].replace("<main>", '<main><script>throw "x"</script><img src="http://nowhere.invalid/a.png">')
    file = tmp_path / "spoiled.html"
    file.write_text(spoiled, encoding="utf-8")
    _, console = browse(file)
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    words = {5: "first", 20: "second", 390: "third"}
    labels = "".join(f'<text x="{x}" y="20">{word}</text>' for x, word in words.items())
    drawing = f'<div style="width: 3000px"><svg viewBox="0 0 400 40" style="width: 400px">{labels}</svg></div>'
    found = measure(f"<!doctype html><html><body>{drawing}</body></html>", tmp_path, 1100)
    assert collisions(found) == ["'first' and 'second'", "'third' leaves its drawing"]
    assert found["width"] > found["window"]
