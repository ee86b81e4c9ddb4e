"""pytest tests/test_gpu.py

bench/gpu.py does all its parts without a GPU, writes what it prints, and says which part failed.
"""
import json
import subprocess
import sys

from conftest import ROOT

def test_every_part_of_the_check_of_a_gpu_is_ok_on_a_cpu_and_leaves_its_figures(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py", "--out", tmp_path], text=True,
                          capture_output=True)
    assert done.returncode == 0 and "every part is ok" in done.stdout, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part for part in parts if parts[part]["ok"]] == ["correctness", "1B", "8B", "task", "graphs"]
    for what in ("DPO's first loss, off ln 2", "decoding, 4 rows, prompts of 24 tokens", "gold, round 1",
                 "DPO, 2 pairs at a time, recompute", "1B, 4 rows: a decoding step, compiled"):
        assert f"| {what} |" in done.stdout and what in str(parts)

def test_a_part_that_takes_too_long_is_stopped_and_named(tmp_path):
    code = ("import sys; sys.path.insert(0, 'bench'); import gpu; gpu.PARTS['8B'] = 1, *gpu.PARTS['8B'][1:]; "
            f"sys.argv += ['--parts', '8B', '--out', {str(tmp_path)!r}]; gpu.main()")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 1 and "8B failed: stopped after 1 s" in done.stdout
