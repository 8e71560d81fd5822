"""The package as Salt and pip see it: costless to import, in layers, and whole in its wheel."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "salt_mysql_engine"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
FOLDERS = ("engines", "runners", "returners", "output")

LAYERS = (
    {
        "errors",
        "folders",
        "jsontext",
        "sessions",
        "settings",
        "tls",
        "clock",
        "waits",
        "salvage",
        "journalfile",
        "mending",
        "letters",
        "decoder",
    },
    {
        "moments",
        "saltevent",
        "jobload",
        "records",
        "sql",
        "database",
        "pillar",
        "jobcache",
        "pool",
        "steady",
        "partitions",
    },
    {"schema", "stencil", "items", "rows", "blueprint", "folding", "shadow", "backfill", "survey", "purge"},
    {
        "bus",
        "capture",
        "journal",
        "batcher",
        "large",
        "verify",
        "decoding",
        "writer",
        "reconcile",
        "control",
        "spool",
        "intake",
        "telling",
    },
    {"migrate", "retention", "pending", "reader", "search"},
    {"answers", "history"},
    {"engine", "verbs", "upkeep"},
)
"""A module imports from its own layer and those before it."""

FOREIGN = {
    "database": {"aiomysql", "pymysql"},
    "reader": {"pymysql"},
    "pool": {"pymysql"},
    "pillar": {"salt"},
    "bus": {"msgpack"},
    "decoder": {"msgpack"},
    "decoding": {"msgpack"},
    "saltevent": {"msgpack"},
}
"""What a module may import that is neither ours nor the standard library's."""


def imports(path: Path) -> set[str]:
    """What a file imports, anywhere in it; the package's own modules as ``.name``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def layer(module: str) -> int:
    (number,) = (number for number, names in enumerate(LAYERS) if module in names)
    return number


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    for name in imports(PACKAGE / f"{module}.py"):
        if name.startswith(".") and name[1:] in MODULES:
            assert layer(name[1:]) <= layer(module), f"{module} must not import {name[1:]}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    uses = {module: {name[1:] for name in imports(PACKAGE / f"{module}.py")} & set(MODULES) for module in MODULES}
    while leaves := [module for module, used in uses.items() if not used & uses.keys()]:
        for module in leaves:
            del uses[module]
    assert uses == {}, "these import each other in a circle"


@pytest.mark.parametrize("module", MODULES)
def test_database_alone_knows_aiomysql_and_pillar_alone_knows_salt(module: str) -> None:
    foreign = {name for name in imports(PACKAGE / f"{module}.py") if name[0] != "."} - sys.stdlib_module_names
    assert foreign <= FOREIGN.get(module, set())


def modules_after(statement: str) -> tuple[set[str], float]:
    """What a fresh interpreter has loaded more after a statement, and the CPU seconds that took."""
    script = f"import sys, time; had = set(sys.modules); began = time.process_time(); {statement}; "
    script += "took = time.process_time() - began; print(took, *(set(sys.modules) - had))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *names = done.stdout.split()
    return set(names), float(seconds)


def test_importing_the_package_costs_nothing_since_every_salt_process_does_it() -> None:
    names, seconds = modules_after("import salt_mysql_engine")
    assert names == {"salt_mysql_engine"}
    assert seconds < 0.02


def test_loading_the_runner_and_the_engine_file_imports_the_standard_library_alone() -> None:
    files = [f"_{folder}/mysql_jobcache.py" for folder in ("engines", "runners")]
    names, _ = modules_after(f"import runpy; [runpy.run_path(file) for file in {files}]")
    own = {name for name in names if name.split(".")[0] == "salt_mysql_engine"}
    assert "salt_mysql_engine.verbs" in own
    assert {name.split(".")[0] for name in names - own} <= sys.stdlib_module_names


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_loader_file_imports_nothing_but_the_package_and_the_standard_library(folder: str) -> None:
    for path in (ROOT / f"_{folder}").glob("*.py"):
        assert imports(path) <= sys.stdlib_module_names | {"salt_mysql_engine", "salt"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(folder))
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("salt_mysql_engine-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


@pytest.mark.parametrize(
    ("source", "target"),
    [(f"_{folder}", f"salt_mysql_engine/{folder}") for folder in FOLDERS] + [("schema", "salt_mysql_engine/schema")],
)
def test_the_wheel_holds_the_loader_files_and_the_schema_from_their_one_place(
    wheel: zipfile.ZipFile, source: str, target: str
) -> None:
    files = {path.relative_to(ROOT / source).as_posix() for path in (ROOT / source).rglob("*.*")}
    files = {name for name in files if "__pycache__" not in name}
    assert files, f"{source} is empty"
    for name in files:
        assert wheel.read(f"{target}/{name}") == (ROOT / source / name).read_bytes()


def test_the_wheel_holds_every_module_and_nothing_else_at_its_top(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {f"salt_mysql_engine/{module}.py" for module in MODULES} < set(names)
    assert len(names) == len(set(names))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"salt_mysql_engine"}


def test_the_wheel_declares_the_entry_point_by_which_salts_loader_finds_it(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert entry_points["salt.loader"]["salt-mysql-engine"] == "salt_mysql_engine"


def test_the_wheel_does_not_ask_pip_for_salt(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist: ")]
    assert any(line.startswith("Requires-Dist: aiomysql") for line in required)
    assert not [line for line in required if line.lower().startswith("requires-dist: salt")]
