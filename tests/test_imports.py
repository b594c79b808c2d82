"""No circles among our modules: imports at the top, in functions and under TYPE_CHECKING all count."""

from __future__ import annotations

import grimp
import networkx
import pytest


def circles(package: str) -> list[list[str]]:
    graph = grimp.build_graph(package, cache_dir=None)
    imports = networkx.DiGraph()
    for module in graph.modules:
        imports.add_edges_from((module, other) for other in graph.find_modules_directly_imported_by(module))
    return sorted(sorted(circle) for circle in networkx.strongly_connected_components(imports) if len(circle) > 1)


def test_no_module_imports_itself_through_others():
    assert circles("adaptinfer") == []


@pytest.mark.parametrize(
    "how", ["{}", "def late():\n    {}", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}"]
)
def test_a_circle_is_found_wherever_its_import_stands(tmp_path, monkeypatch, how):
    name = f"circular{abs(hash(how))}"
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text(f"from {name} import two")
    (package / "two.py").write_text(how.format(f"from {name}.one import two"))
    monkeypatch.syspath_prepend(tmp_path)
    assert circles(name) == [[f"{name}.one", f"{name}.two"]]
