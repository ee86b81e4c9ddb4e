"""pytest tests/test_bench.py

Every benchmark in bench/ runs, the project's side and its peers' do the same work, and the tables in docs/
follow from the data beside them.
"""
import importlib.util
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import toy

BENCH = Path(__file__).parents[1] / "bench"
DATA = BENCH.parent / "docs" / "data"
CALLS = [["sampler_project", "tiny"], *(["sampler_peer", "tiny", kind] for kind in ("sorted", "continuous")),
         ["training_project", "dpo", "tiny"], ["training_project", "reward", "tiny"],
         ["scoring_project", "tiny"], ["scoring_peer", "tiny", "plain"]]
if importlib.util.find_spec("trl"):
    CALLS += [["training_peer", "dpo", "tiny"], ["training_peer", "reward", "tiny"]]

@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_the_project_and_its_peers_all_give_a_rate_and_a_peak_of_memory(tmp_path):
    code = (f"import json, sys, pathlib; sys.path.insert(0, {str(BENCH)!r}); import bench; "
            f"bench.FOLDER = pathlib.Path({str(tmp_path)!r}); "
            f"[print(json.dumps(getattr(bench, f)(*a))) for f, *a in {CALLS!r}]; "
            "print(json.dumps(bench.training_profile('tiny')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rate"')]
    assert len(results) == len(CALLS)
    assert all(result["rate"] > 0 and result["peak"] > 50 for result in results)
    # the sides draw tokens in different ways, but from one distribution
    lengths = [result["mean_length"] for result in results if "mean_length" in result]
    assert len(lengths) == 3 and max(lengths) < 1.3 * min(lengths)
    profile = json.loads(done.stdout.splitlines()[-1])
    assert all(part > 0 for part in profile["seconds"].values()) and 0 < profile["rate"] < profile["best"]

def test_an_unknown_part_of_the_benchmark_is_refused():
    done = subprocess.run([sys.executable, BENCH / "bench.py", "everything"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'everything'" in done.stderr

def test_the_samplers_rows_are_busy_more_than_93_percent_of_the_time():
    code = (f"import json, sys; sys.path.insert(0, {str(BENCH)!r}); import bench, sampler; "
            "size = sampler.block_size(3000, 16 / 5); "
            "print(json.dumps([size, bench.block_steps(16, size, 3000)]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, result = json.loads(done.stdout)
    assert len(result["steps"]) == -(-3000 // size) == 40 and result["busy"] > 0.93

def test_a_kept_gradient_and_kept_weights_are_exchanged_once_a_step_with_the_same_result(tmp_path):
    make = (f"import sys, pathlib; sys.path.insert(0, {str(BENCH)!r}); import bench; "
            f"bench.FOLDER = pathlib.Path({str(tmp_path)!r}); bench.folder_of('tiny')")
    subprocess.run([sys.executable, "-c", make], check=True)
    results = []
    for kept in ((False, False), (True, False), (True, True)):
        code = (f"import json, sys, pathlib; sys.path.insert(0, {str(BENCH)!r}); import bench; "
                "from common import parallel; "
                f"bench.FOLDER = pathlib.Path({str(tmp_path)!r}); "
                f"result = json.dumps(bench.training_traffic('tiny', *{kept})); "
                "parallel.say(result); bench.os._exit(0)")
        path = tmp_path / "traffic.py"
        path.write_text(code)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc-per-node", "2", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    nothing, gradient, both = results  # what is kept between the micro-batches
    half = nothing["parameters"] / 2  # of all parameters, what one process receives from the other
    assert nothing["gradients"] == pytest.approx(4 * half, rel=0.02)  # in each of four micro-batches
    assert gradient["gradients"] == both["gradients"] == pytest.approx(half, rel=0.02)
    assert nothing["weights"] == gradient["weights"] > 4 * half
    assert both["weights"] == pytest.approx(half, rel=0.02)
    for other in (gradient, both):
        assert other["norms"] == pytest.approx(nothing["norms"], rel=1e-6)

def test_the_labels_of_the_map_prefer_an_answer_as_often_as_noisy_gold_does():
    rng = random.Random(0)
    rows = [(prompt, [toy.demonstration(prompt, rng) for _ in range(2)]) for prompt in toy.parts(0)["test"]]
    code = (f"import json, sys; sys.path.insert(0, {str(BENCH)!r}); import map; "
            "print(json.dumps([map.label(*row) for row in json.load(sys.stdin)]))")
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(rows), capture_output=True,
                          text=True, check=True)
    labels = json.loads(done.stdout)
    gold = [[toy.gold(prompt, answer) for answer in answers] for prompt, answers in rows]
    above = [second - first for first, second in gold]
    chance = [1 / (1 + math.exp(-gap / toy.LABEL_NOISE)) for gap in above]
    surprise = sum((label - p) * gap for label, p, gap in zip(labels, chance, above))
    assert abs(surprise) < 3 * sum(p * (1 - p) * gap**2 for p, gap in zip(chance, above))**0.5
    assert len({label == (gap > 0) for label, gap in zip(labels, above)}) == 2  # some labels are wrong

def lines_of(text):
    """The lines of tables, as lists of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")
            if line.startswith("|")]

def printed(code):
    """The lines of the tables that code prints, which may import the scripts of bench/."""
    code = f"import sys\nsys.path.insert(0, {str(BENCH)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=BENCH.parent)
    return lines_of(done.stdout)

@pytest.mark.parametrize("name, least", [("arms", 4), ("arms-alike", 20)])
def test_the_table_of_arms_in_the_docs_follows_from_its_data(name, least):
    lines = printed(f"""import arms
runs = {{}}
for row in arms.read_jsonl("docs/data/{name}.jsonl"):
    runs.setdefault(row["arm"], {{}}).setdefault(row["seed"], []).append(row)
arms.table({{arm: [*by_seed.values()] for arm, by_seed in runs.items()}})""")
    theirs = lines_of((DATA / f"{name}.md").read_text())
    without_seconds = [sorted(line[:-1] for line in table) for table in (lines, theirs)]
    assert len(lines) >= least and without_seconds[0] == without_seconds[1]

def test_the_tables_of_the_map_in_the_docs_follow_from_its_data():
    lines = printed("import map; map.tables(map.read_jsonl('docs/data/map.jsonl'))")
    assert len(lines) > 60 and lines == lines_of((DATA / "map.md").read_text())

def test_the_figures_in_the_docs_are_those_of_the_full_tables():
    names = ("arms.md", "arms-alike.md", "map.md", "map-alike.md")
    text = (DATA.parent / "results.md").read_text()
    whole = lines_of("\n".join((DATA / name).read_text() for name in names))
    lines = [line for line in lines_of(text) if " ± " in "".join(line)]
    wrong = [line for line in lines if not any(
        line[0] == other[0] and {cell for cell in line if " ± " in cell} <= {*other} for other in whole)]
    assert len(lines) > 10 and wrong == []
    text += (BENCH.parent / "variants/README.md").read_text()
    given, known = (set(re.findall(r"\d\.\d\d ± \d\.\d\d", some)) for some in (text, str(whole)))
    assert len(given) > 20 and given - known == {"3.06 ± 0.02"}  # the older world's base
