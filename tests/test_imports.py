"""pytest tests/test_imports.py

Every module imports, says what it is, and has a command line that explains itself. Imports stand at the
top of a module and form no circle.
"""
import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("evals/*.py")])}
SCRIPTS = [name for name, path in MODULES.items() if "launch(main)" in path.read_text()]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_has_a_docstring(name):
    assert importlib.import_module(name).__doc__.strip()


def test_the_optional_packages_are_optional():
    code = f"import sys; sys.modules.update(matplotlib=None, datasets=None); import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imported(tree):
    """[(line, module)] of the project's modules that are imported anywhere in a syntax tree."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            parent = ".".join(filter(None, ["evals" * (node.level > 0), node.module]))
            names = [parent, *(f"{parent}.{name}" for name in names)]
        found += [(node.lineno, name) for name in names if name in MODULES]
    return found


def test_the_projects_imports_form_no_circle():
    graph = {name: {other for _, other in imported(ast.parse(path.read_text()))}
             for name, path in MODULES.items()}
    assert graph["mt"] >= {"toy", "evals.gold", "evals.report"}  # both forms of import are seen
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' imports '.join(reversed(error.args[1]))}")


def test_no_function_imports_a_module_of_the_project():
    inside = {f"{path.relative_to(ROOT)}:{line} imports {other}" for path in MODULES.values()
              for function in ast.walk(ast.parse(path.read_text()))
              if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
              for line, other in imported(function)}
    assert not inside


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name, call, capsys):
    with pytest.raises(SystemExit) as end:
        call(importlib.import_module(name), "--help")
        sys.exit(0)  # eval.py, which has commands of its own, returns
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert importlib.import_module(name).__doc__.strip().splitlines()[0] in said


@pytest.mark.parametrize("command", ["winrate", "accuracy", "agreement", "report"])
def test_every_command_of_eval_explains_itself(command, call, capsys):
    with pytest.raises(SystemExit) as end:
        call(importlib.import_module("eval"), command, "--help")
    assert end.value.code == 0 and "--" in capsys.readouterr().out


def test_the_help_of_the_loop_names_each_flag_once_with_the_papers_default(call, capsys):
    mt = importlib.import_module("mt")
    with pytest.raises(SystemExit):
        call(mt, "--help")
    said = capsys.readouterr().out
    said = " ".join(said[said.index("options:"):].split())
    for name, field in mt.Options.__dataclass_fields__.items():
        _, shown = re.split(rf"--(?:no_)?{name}\b", said)  # it stands there once
        assert f"(default: {field.default})" in shown.partition(" --")[0], name


@pytest.mark.parametrize("words", ["--no_select", "--no-select", "--select false", "--select=false"])
def test_a_switch_is_turned_off_in_any_of_the_usual_ways(words):
    run, mt = map(importlib.import_module, ("run", "mt"))
    assert run.parse(mt.Options, words.split()).select is False


FLAGS = {
    "mt": "policy rm prompts rounds out seed samples temperature top_p max_new_tokens max_length beta "
          "policy_lr policy_batch rm_lr rm_batch save_every select_prompts tau update_rm select filter",
    "sampler": "model prompts out samples temperature top_p max_new_tokens seed",
    "reward": "model pairs test out lr batch epochs samples",
    "dpo": "model pairs out beta lr batch epochs",
}


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_that_other_peoples_scripts_use_stay(name):
    assert set(FLAGS[name].split()) <= importlib.import_module(name).Options.__dataclass_fields__.keys()


def test_the_papers_values_are_the_defaults():
    o = importlib.import_module("mt").Options()
    assert (o.samples, o.temperature, o.top_p, o.beta, o.max_length) == (5, 0.8, 0.95, 0.01, 2048)
    assert (o.policy_lr, o.policy_batch, o.rm_lr, o.rm_batch) == (7e-7, 128, 2e-6, 512)
    assert (o.save_every, o.select_prompts, o.tau) == (50, 2000, 0.6)
    assert o.update_rm and o.select and o.filter


@pytest.mark.parametrize("words", [["--rounds", "many"], ["--beeta", "1"]])
def test_a_flag_that_is_unknown_or_ill_typed_is_exit_code_2(words, script):
    done = script("mt.py", *words)
    assert done.returncode == 2
    assert words[0].lstrip("-") in done.stderr and "Traceback" not in done.stderr
