"""pytest tests/test_imports.py

The structure of the project: which module may import which, how long files and functions may be, and that
every command explains itself.
"""
import ast
import contextlib
import importlib
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import forked

import eval as eval_script
import mt
from common import run, toy
from variants import simpo

ROOT = Path(__file__).parents[1]
SCRIPTS = ["mt", "dpo", "reward", "sampler", "filter", "eval"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for pattern in ("*.py", "common/*.py", "evals/*.py", "variants/*.py", "bench/*.py")
           for path in sorted(ROOT.glob(pattern)) if path.name != "__init__.py"}
CORE = {name: path for name, path in MODULES.items() if name in SCRIPTS or name.startswith("common.")}
LAYERS = [  # from the lowest up; a module imports only from layers below its own
    ["common.parallel"], ["common.data"], ["common.packing"], ["common.probe", "common.run"],
    ["common.models"], ["common.training"], ["sampler", "filter"], ["reward", "dpo"], ["common.toy"],
    [name for name in MODULES if name.startswith("evals.") and name != "evals.plan"], ["eval"], ["mt"],
    ["evals.plan"], [name for name in MODULES if name.startswith("variants.")],
    [name for name in MODULES if name.startswith("bench.")]]
OWN = ("evals", "variants")  # folders in which a module may import its neighbours
INDIRECT = {"huggingface_hub"}  # in no requirements file: transformers installs it, in the version it needs

def names_in(tree):
    """The dotted names of all that is imported anywhere in a syntax tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found

def imported(tree):
    """The project's modules that are imported anywhere in a syntax tree."""
    return names_in(tree) & MODULES.keys()

TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
GRAPH = {name: imported(tree) for name, tree in TREES.items()}

@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_and_has_a_docstring(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")  # bench's scripts import each other from their own folder
    assert importlib.import_module(name.removeprefix("bench.")).__doc__.strip()

def test_imports_point_down_and_form_no_circle():
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    assert height.keys() == MODULES.keys()
    assert GRAPH["mt"] >= {"common.toy", "evals.gold", "dpo"}  # finds every form of import
    for name, others in GRAPH.items():
        for other in others:
            assert height[other] < height[name] or name.split(".")[0] == other.split(".")[0] in OWN, (
                f"{name} imports {other}")
    assert not [name for name in CORE for other in GRAPH[name]
                if name.startswith("common.") and other in SCRIPTS and name != "common.toy"]
    TopologicalSorter(GRAPH).prepare()  # raises CycleError for a circle

def test_only_packages_in_the_requirements_are_imported():
    def listed(file):
        return {re.split(r"[=<>~ ]", line)[0] for line in (ROOT / file).read_text().splitlines()}
    known = {*sys.stdlib_module_names, *SCRIPTS, "common", "evals", "variants", "bench"}
    needed, every = (listed(name) | known | INDIRECT for name in ("requirements.txt", "requirements-dev.txt"))
    for name, tree in TREES.items():
        if name.startswith("bench."):  # it measures other libraries too
            continue
        used = {dotted.split(".")[0] for dotted in names_in(tree)}
        inside = {dotted.split(".")[0] for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
                  for dotted in names_in(function)}
        assert used - needed <= inside & every, name  # datasets and matplotlib are optional

def test_files_and_functions_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in CORE.items()}
    assert not {name: length for name, length in lengths.items() if length > 400}
    functions = {f"{name}.{node.name}": node.end_lineno - node.lineno + 1 for name in CORE
                 for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)}
    assert not {name: length for name, length in functions.items() if length > 45}
    assert sum(lengths.values()) <= 3000, lengths
    assert len(mt.Options.__dataclass_fields__) <= 29

# ---------------------------------------------------------------- command lines
@pytest.mark.parametrize("command", [*SCRIPTS, *(f"eval {command}" for command in eval_script.COMMANDS)])
def test_every_command_explains_itself(command, call, capsys, monkeypatch):
    name, *words = command.split()
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "__main__", module)  # mt.py shows the docstring of the script that runs
    with contextlib.suppress(SystemExit):  # argparse exits; eval.py returns
        call(module, *words, "--help")
    said = capsys.readouterr().out
    assert ("--" if words else module.__doc__.strip().splitlines()[0]) in said
    assert name == "eval" or "(default: " in said

def test_the_help_of_a_variant_is_its_own_with_its_defaults_on_the_embedded_task(capfd):
    forked("variants.simpo", ["--help"], 1)
    said = capfd.readouterr().out
    assert simpo.__doc__ in said and mt.__doc__ not in said
    defaults = re.search(r"The embedded task's defaults are (.*?)\n\n", said, re.S)[1].split()
    assert defaults == [word for name, value in (toy.SETTINGS | {"beta": 2.0}).items()
                        for word in (f"--{name}", str(value))]

def test_the_papers_values_are_the_defaults():
    o = mt.Options()
    assert (o.samples, o.temperature, o.top_p, o.beta, o.max_length) == (5, 0.8, 0.95, 0.01, 2048)
    assert (o.policy_lr, o.policy_batch, o.rm_lr, o.rm_batch) == (7e-7, 128, 2e-6, 512)
    assert (o.save_every, o.select_prompts, o.tau) == (50, 2000, 0.6)
    assert o.update_rm and o.select and o.filter
    assert not run.parse(mt.Options, ["--select", "false"]).select
