"""Imports run one way, so that a room can be understood with those under it alone."""

import ast
from pathlib import Path

import pytest

import vitprobe
from vitprobe.catalogue import measurements

PACKAGE = Path(vitprobe.__file__).parent
MEASUREMENTS = list(measurements())
# A module may import from its own floor or a lower one: from the commands down to the errors.
FLOORS = (
    ("__main__", "listing", "layer_table", "activations", "extract"),
    ("report",),
    ("redraw", "together", *MEASUREMENTS),
    ("cli",),
    ("papers",),
    ("running",),
    ("tracing",),
    ("statistics",),
    ("models", "images"),
    ("results",),
    ("data",),
    ("catalogue", "errors", "_version", "__init__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """``vitprobe.running.loop`` is in ``running``, ``vitprobe.cka`` in itself."""
    return [*module.split("."), "__init__"][1]


def imports(path: Path) -> list[str]:
    """Modules of vitprobe that a file imports, at its head or within a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif (
            isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vitprobe")
        ):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(inner if known(inner) else node.module)
    return [name for name in found if name.split(".")[0] == "vitprobe"]


def known(name: str) -> bool:
    return name in MODULES or f"{name}.__init__" in MODULES


def test_every_module_stands_in_a_room():
    assert {room(module) for module in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "__init__"])
def test_imports_go_down(module):
    mine = room(module)
    for other in map(room, imports(MODULES[module])):
        assert FLOOR[other] >= FLOOR[mine], f"{module} imports {other}, which stands above it"
        if mine in MEASUREMENTS:
            assert other == mine or other not in MEASUREMENTS, f"{module} imports {other}"


def test_the_images_and_the_models_do_not_know_each_other():
    for one, other in (("images", "models"), ("models", "images")):
        for module in MODULES:
            if room(module) == one:
                assert other not in map(room, imports(MODULES[module])), module


def test_no_circle():
    graph = {}
    for module, path in MODULES.items():
        if module == "vitprobe.__init__":
            continue  # its names load on first use
        found = {name if name in MODULES else f"{name}.__init__" for name in imports(path)}
        graph[module] = {name for name in found if name != "vitprobe.__init__"} - {module}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_room_says_what_belongs_in_it():
    for path in PACKAGE.glob("*/__init__.py"):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert doc and len(doc.split()) >= 8, path


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: path.stem)
def test_no_file_is_too_long_to_be_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
