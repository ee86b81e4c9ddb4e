"""Every side of the benchmark runs, and the sides do the same work.

    pytest tests/test_bench.py
"""
import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

import toy
from data import read_jsonl, write_jsonl

BENCH = Path(__file__).parents[1] / "bench"
CALLS = [["sampler_project", "tiny"], *(["sampler_peer", "tiny", kind] for kind in ("sorted", "continuous")),
         ["training_project", "dpo", "tiny"], ["training_project", "reward", "tiny"],
         ["scoring_project", "tiny"], ["scoring_peer", "tiny", "plain"]]
if importlib.util.find_spec("trl"):
    CALLS += [["training_peer", "dpo", "tiny"], ["training_peer", "reward", "tiny"]]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_every_side_gives_a_rate_and_a_peak(tmp_path):
    code = (f"import json, sys, pathlib; sys.path.insert(0, {str(BENCH)!r}); import bench; "
            f"bench.FOLDER = pathlib.Path({str(tmp_path)!r}); "
            f"[print(json.dumps(getattr(bench, f)(*a))) for f, *a in {CALLS!r}]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rate"')]
    assert len(results) == len(CALLS)
    assert all(result["rate"] > 0 and result["peak"] > 50 for result in results)
    # the sides draw in ways of their own, from one distribution
    lengths = [result["mean_length"] for result in results if "mean_length" in result]
    assert len(lengths) == 3 and max(lengths) < 1.3 * min(lengths)


def test_a_part_must_be_named():
    done = subprocess.run([sys.executable, BENCH / "bench.py", "everything"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'everything'" in done.stderr


def test_the_rows_of_the_sampler_are_busy_over_many_blocks():
    code = (f"import json, sys; sys.path.insert(0, {str(BENCH)!r}); import bench, sampler; "
            "size = sampler.block_size(3000, 16 / 5); "
            "print(json.dumps([size, bench.block_steps(16, size, 3000)]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, result = json.loads(done.stdout)
    assert len(result["steps"]) == -(-3000 // size) == 40 and result["busy"] > 0.93


def test_gradients_are_exchanged_once_a_step_and_held_weights_too_with_the_same_result(tmp_path):
    make = (f"import sys, pathlib; sys.path.insert(0, {str(BENCH)!r}); import bench; "
            f"bench.FOLDER = pathlib.Path({str(tmp_path)!r}); bench.folder_of('tiny')")
    subprocess.run([sys.executable, "-c", make], check=True)
    results = []
    for held in ((False, False), (True, False), (True, True)):
        code = (f"import json, sys, pathlib; sys.path.insert(0, {str(BENCH)!r}); import bench, parallel; "
                f"bench.FOLDER = pathlib.Path({str(tmp_path)!r}); "
                f"result = json.dumps(bench.training_traffic('tiny', *{held})); "
                "parallel.say(result); bench.os._exit(0)")
        path = tmp_path / "traffic.py"
        path.write_text(code)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc-per-node", "2", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    every, gradient, both = results
    half = every["parameters"] / 2  # what a process receives of all parameters
    assert every["gradients"] == pytest.approx(4 * half, rel=0.02)  # in each of four micro-batches
    assert gradient["gradients"] == both["gradients"] == pytest.approx(half, rel=0.02)
    assert every["weights"] == gradient["weights"] > 4 * half
    assert both["weights"] == pytest.approx(half, rel=0.02)
    for other in (gradient, both):
        assert other["norms"] == pytest.approx(every["norms"], rel=1e-6)


def test_the_labeller_of_the_embedded_task_labels_open_rows_by_noisy_gold(tmp_path):
    rng, path = random.Random(0), tmp_path / "ask.jsonl"
    rows = [dict(prompt=prompt, answers=[toy.demonstration(prompt, rng) for _ in range(2)], chosen=None)
            for prompt in toy.parts(0)["test"]]
    write_jsonl(path, [*rows, dict(rows[0], chosen=0), dict(rows[0], chosen=1)])
    subprocess.run([sys.executable, BENCH / "label.py", path], check=True)
    *rows, zero, one = read_jsonl(path)
    assert (zero["chosen"], one["chosen"]) == (0, 1)
    gold = [[toy.gold(row["prompt"], answer) for answer in row["answers"]] for row in rows]
    above = [second - first for first, second in gold]
    chance = [1 / (1 + math.exp(-gap / toy.LABEL_NOISE)) for gap in above]
    surprise = sum((row["chosen"] - p) * gap for row, p, gap in zip(rows, chance, above))
    assert abs(surprise) < 3 * sum(p * (1 - p) * gap**2 for p, gap in zip(chance, above))**0.5
    assert len({row["chosen"] == (gap > 0) for row, gap in zip(rows, above)}) == 2  # noise, too


def test_the_maps_tables_in_the_docs_are_those_of_its_rows():
    code = (f"import sys; sys.path.insert(0, {str(BENCH)!r}); import map; "
            "rows = map.read_jsonl(map.HOME / 'docs/data/map.jsonl'); map.tables(rows); map.curve(rows)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    docs = (BENCH.parent / "docs" / "results.md").read_text()
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 4 and [table for table in tables if f"\n\n{table}\n\n" not in docs] == []
