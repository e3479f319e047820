"""The tool that counts the operations of denoisers."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from osp.denoiser.patterns import Window, register_pattern

TOOL = Path(__file__).resolve().parents[2] / "tools" / "denoiser_flops.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("denoiser_flops", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["denoiser_flops", *arguments])
    tool.main()


def test_any_denoiser_with_any_registered_pattern_is_counted(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_pattern("tool_window", Window)
    stages = "denoiser.stages=[{blocks:2,pattern:tool_window,k:4}]"
    run(tool, monkeypatch, "denoiser=cross_tiny", stages, "--videos", "9x64x64", "--latent-frame", "8")
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["9x64x64", "cross_tiny", "2x8x8", "32"]
    assert cells[-1] == "8.00x"  # windows of 4 of the 32 tokens
    run(tool, monkeypatch, "--models", "cross_tiny", "opensora_v12", "--videos", "9x64x64")
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert "| 3x8x8 | 48 |" in first
    assert "| opensora_v12 |" in second
    assert second.endswith("| - | - | - | - |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["denoiser=unheard"], "denoiser/unheard.*cross_tiny"),
        (["denoiser=published"], r"denoiser=published needs denoiser\.kind=\.\.\. and denoiser\.source="),
        (["denoiser.stages=[{blocks:2,pattern:unheard}]"], "pattern=unheard: is not known"),
        (["--videos", "64x64"], "--videos 64x64: must be FRAMESxHEIGHTxWIDTH"),
        (["--text-tokens", "0"], "--text-tokens=0: must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_counted_is_told_in_one_line(
    arguments: list[str],
    message: str,
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tool, monkeypatch, *arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err.count("\n") == 1
    assert re.search(message, said.err), said.err
    assert not said.out
