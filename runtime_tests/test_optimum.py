"""`optimum-cli export mobile`: found by optimum, from an editable install and from a wheel; one parser."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from export.arguments import build_parser

ROOT = Path(__file__).resolve().parent.parent
CLI = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"


def optimum(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CLI, "export", "mobile", *words], capture_output=True, text=True, check=False
    )


def test_optimum_finds_the_command_with_all_options() -> None:
    done = optimum("--help")
    assert done.returncode == 0, done.stderr
    ours = [option for action in build_parser()._actions for option in action.option_strings]
    assert [option for option in ours if option not in done.stdout] == []


def test_same_messages_and_exit_codes() -> None:
    done = optimum("--target", "onnx", "--size", "tinny")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --size tinny: unknown; choose one of tiny, 0.8b, 2b, 4b, 9b (did you mean tiny?)\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--size tinny --json", "--size tinny: unknown; choose one of tiny"),
        ("--siz tiny --json", "unknown option --siz (did you mean --size?); see `python -m export --help`"),
        ("--siz=tiny --json", "unknown option --siz (did you mean --size?); see `python -m export --help`"),
        ("--threads two --json", "argument --threads: invalid int value: 'two'"),
        ("validate BUNDLE --json", "unknown option validate"),
    ],
)
def test_mistakes_are_answered_as_by_the_other_command(line: str, message: str) -> None:
    words = ["--target", "onnx", *line.split()]
    direct = subprocess.run(
        [sys.executable, "-m", "export", "export", *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    done = optimum(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, direct.stdout, direct.stderr)
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert json.loads(done.stdout) == {"error": done.stderr[len("error: ") :].rstrip("\n"), "exit_code": 2}


def test_same_pipeline() -> None:
    words = ["--target", "onnx", "--size", "2b", "--checkpoint", "random", "--dry-run", "--json"]
    direct = subprocess.run(
        [sys.executable, "-m", "export", *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert optimum(*words).stdout == direct.stdout != ""


def test_no_folder_of_the_namespace_is_a_regular_package() -> None:
    assert list((ROOT / "export/optimum_plugin").rglob("__init__.py")) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from this tree; needs no network, hatchling is installed with `dev`."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (file,) = folder.glob("qwen35_mobile-*.whl")
    with zipfile.ZipFile(file) as archive:
        return archive.namelist()


def test_the_wheel_puts_the_plug_in_into_optimums_namespace(wheel: list[str]) -> None:
    assert [name for name in wheel if name.startswith("optimum/")] == ["optimum/commands/register/mobile.py"]
    assert not any("optimum_plugin" in name for name in wheel)


def test_the_wheel_is_complete(wheel: list[str]) -> None:
    tracked = {p.relative_to(ROOT).as_posix() for top in ("export", "targets") for p in (ROOT / top).rglob("*.py")}
    assert sorted(p for p in tracked - set(wheel) if "optimum_plugin" not in p) == []
    needed = {
        "export/bundle/bundle.schema.json",
        "export/bundle/golden/onnx-single.json",
        "export/quantize/recipes.toml",
        "export/_checkpoints/tiny/config.json",
        "export/_checkpoints/tiny/model.safetensors",
        "export/_checkpoints/tiny/tokenizer.json",
        "export/_checkpoints/tiny/chat_template.jinja",
    }
    assert needed - set(wheel) == set()
    assert not any(name.startswith(("runtime_tests/", "docs/", "checkpoints/")) for name in wheel)
