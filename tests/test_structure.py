"""The house: small functions, thin faces, rooms with a purpose, and hardware named in one place."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "osp"
FILES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

LONGEST_FUNCTION = 60
COMMAND_LINE = 2150  # lines
NO_ROOMS = {"utils", "common", "core", "helpers"}
HARDWARE = ("cuda", "npu")


def parsed(files: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    """Each node of each file, with the file's path in the checkout."""
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            yield str(file.relative_to(ROOT)), node


def outside(*rooms: str) -> list[Path]:
    return [file for file in FILES if file.relative_to(PACKAGE).parts[0] not in rooms]


def imported(node: ast.AST) -> set[str]:
    """The modules, and what may be one, that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def test_no_function_is_long() -> None:
    long = [
        f"{path}:{node.lineno} {node.name}: {lines} lines"
        for path, node in parsed([*FILES, *TOOLS])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not long


def test_docstrings_open_with_what_comes_out() -> None:
    riddling = [
        f"{path}:{node.body[0].lineno}"
        for path, node in parsed([*FILES, *TOOLS])
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and re.match(r"What\b", ast.get_docstring(node) or "")
    ]
    assert not riddling


def test_the_command_line_holds_no_logic() -> None:
    lines = {file.name: len(file.read_text().splitlines()) for file in (PACKAGE / "cli").rglob("*.py")}
    assert lines
    assert sum(lines.values()) <= COMMAND_LINE, lines


def test_there_is_no_room_for_whatever_it_is() -> None:
    assert not [file for file in FILES if NO_ROOMS & {*file.relative_to(PACKAGE).with_suffix("").parts}]


def test_only_devices_name_hardware() -> None:
    named = [
        f"{path}:{node.lineno}"
        for path, node in parsed([*outside("devices"), *TOOLS])
        if (isinstance(node, ast.Attribute) and node.attr in HARDWARE)
        or (isinstance(node, ast.Constant) and str(node.value).split(":")[0] in HARDWARE)
    ]
    assert not named


def test_the_import_contracts_know_every_room() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms = {f"osp.{file.relative_to(PACKAGE).with_suffix('').parts[0]}" for file in FILES} - {"osp.__init__"}
    for contract in (one for one in contracts if one["type"] == "forbidden"):
        alone = contract["source_modules"] == ["osp.devices.npu"]
        named = {"osp.devices"} | {*contract["forbidden_modules"]} if alone else {*contract["source_modules"]}
        assert rooms - named <= {"osp.cli", "osp._torchvision"}, contract["name"]
    floors = next(one["layers"] for one in contracts if one["name"] == "Rooms import downwards only")
    assert rooms <= {room.strip(" ()") for floor in floors for room in floor.replace("|", ":").split(":")}


def test_only_devices_and_parallel_talk_to_other_processes() -> None:
    importing = [
        f"{path}:{node.lineno}"
        for path, node in parsed(outside("devices", "parallel"))
        if any(f"{name}.".startswith("torch.distributed.") for name in imported(node))
        or (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed")
    ]
    assert not importing


@pytest.mark.parametrize(
    "statement", ["import torch.distributed", "from torch import distributed", "from torch.distributed import nn"]
)
def test_an_import_is_seen_however_it_is_written(statement: str) -> None:
    assert any(f"{name}.".startswith("torch.distributed.") for name in imported(ast.parse(statement).body[0]))
