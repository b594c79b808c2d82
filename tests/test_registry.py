"""A method outside this package is found by its entry point and by its address, wherever a method is named."""

import importlib
import json

import pytest
from typer.testing import CliRunner

from adaptinfer import AdaptInfer, PrunerError, from_pretrained
from adaptinfer.bench.variants import check_names, variants
from adaptinfer.cli.app import app
from adaptinfer.evaluation.conditions import Condition
from adaptinfer.pruners import METHODS, DivPrune, registry
from adaptinfer.serving.settings import pruner_from

METHOD = '''
import dataclasses
from typing import ClassVar

from adaptinfer import Pruner


@dataclasses.dataclass(frozen=True)
class Mine(Pruner):
    """Keep what the last word looks at."""

    name: ClassVar[str] = "mine"
    reference: ClassVar[str] = "a test"

    power: float = 1.0

    def score(self, view):
        return view.last_to_vision ** self.power


def make():
    class Inner(Mine):
        pass

    return Inner(budget=3)


number = 3
'''
ADDRESS = "outside_methods:Mine"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module beside the package, and a distribution that names its class as a method."""
    (tmp_path / "outside_methods.py").write_text(METHOD)
    folder = tmp_path / "outside-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        f"[adaptinfer.pruners]\nmine = {ADDRESS}\nadaptinfer = {ADDRESS}\nlost = outside_methods:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("outside_methods").Mine
    importlib.sys.modules.pop("outside_methods")


def test_an_edited_method_is_another_condition(mine, tmp_path):
    """A stopped evaluation must not go on with the answers of an earlier version of a method."""

    def identity(pruner):
        return Condition("name", "series", pruner=pruner).identity()

    alone, composed = mine(budget=3), DivPrune(budget=9) >> mine(budget=3)
    before = identity(alone), identity(composed)
    assert all("code" in each for each in before)
    assert "code" not in identity(AdaptInfer(budget=3))  # as older runs wrote it
    (tmp_path / "outside_methods.py").write_text(METHOD.replace("** self.power", "* -1"))
    assert identity(alone) != before[0] and identity(composed) != before[1]


def test_names_and_addresses(mine):
    assert registry.find("mine") is registry.find(ADDRESS) is mine
    assert registry.find("adaptinfer") is AdaptInfer  # no other package takes over a name of ours
    assert registry.names()[: len(METHODS)] == list(METHODS) and registry.names()[-2:] == ["lost", "mine"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "there is no method 'magic'; there are adaptinfer, .*, mine, and package.module:Class"),
        ("lost", "'lost' cannot be imported"),
        ("no_such_module:Mine", "'no_such_module:Mine' cannot be imported"),
        ("outside_methods:number", "must be a subclass of adaptinfer.Pruner, not 3"),
        (None, "there is no method None"),
    ],
)
def test_what_is_no_method(mine, name, message):
    with pytest.raises(PrunerError, match=message):
        registry.find(name)


def test_saved_and_loaded(mine, tmp_path):
    composed = DivPrune(budget=8) >> mine(budget=4, power=2.0)
    for number, pruner in enumerate((mine(budget=0.5, power=2.0), composed)):
        pruner.save_pretrained(tmp_path / str(number))
        assert from_pretrained(tmp_path / str(number)) == pruner
    assert json.loads((tmp_path / "0" / "adaptinfer_config.json").read_text())["method"] == ADDRESS


def test_a_class_inside_a_function_is_not_saved(mine, tmp_path):
    with pytest.raises(PrunerError, match=r"Inner: a class inside a function cannot be found again"):
        importlib.import_module("outside_methods").make().save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mine", ADDRESS])
def test_servers_and_bench(mine, name):
    assert pruner_from({"method": name, "budget": 0.5, "power": 2.0}, "here") == mine(budget=0.5, power=2.0)
    check_names([name], [])
    found = variants([name], [24], [], "on", 144, 6)
    assert [each.pruner for each in found][-1] == mine(budget=24)


def test_methods_of_other_packages_are_listed(mine):
    output = CliRunner().invoke(app, ["methods"]).output
    assert "Keep what the last word looks at." in output and "'lost' cannot be imported" in output
