"""pytest tests/test_nodes.py

Several nodes, which are two of torchrun's agents on one machine here, do what one process does.
"""
import os
import socket
import subprocess
import sys

from conftest import FEW, ROOT


def test_two_nodes_make_the_samples_and_pairs_of_one_process(tiny, written, prompts, tmp_path, script):
    path = written("prompts.jsonl", [{"prompt": p} for p in prompts])
    words = ["--policy", tiny(), "--rm", tiny(reward=True), "--prompts", path, *FEW, "--out"]
    done = script("mt.py", *words, tmp_path / "one")
    assert done.returncode == 0, done.stderr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
         "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port), ROOT / "mt.py",
         *map(str, words), tmp_path / "two"], cwd=tmp_path, env=os.environ, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT) for node in (0, 1)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "round1/e2" in said[0] and "round1/e2" not in said[1]  # rank 0 is on the first node
    for name in ("samples", "pairs"):
        one, two = ((tmp_path / run / "round1/e1" / f"{name}.jsonl").read_text() for run in ("one", "two"))
        assert one == two
    assert (tmp_path / "two" / "report.html").exists()
