"""pytest tests/test_reliability.py

Kills, signals and full disks lose nothing, and two runs in one folder keep out of each other's way. Damaged
results are tested in test_mt.py.
"""
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FEW, ROOT, forked

import mt
from common import run
from common.data import read_jsonl, write_jsonl

@pytest.fixture(scope="module")
def words(tiny, prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": p} for p in prompts])
    return [str(word) for word in ["--policy", tiny(), "--rm", tiny(reward=True), "--prompts", path, *FEW]]

def run_to_its_end(words, folder):
    """Run mt.py in this process, without its report, which takes seconds; returns the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("variants.")]:
            patch.delitem(sys.modules, name)  # else the run notes them as its code, too
        patch.chdir(folder)
        patch.setattr(mt, "report", lambda out: None)
        patch.setattr("sys.argv", ["mt.py", *words, "--out", "run"])
        mt.main()
    return folder / "run"

@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """The folder of a run that nothing has disturbed."""
    return run_to_its_end(words, tmp_path_factory.mktemp("finished"))

def start_run(words, folder, *torchrun):
    """Start mt.py in a process of its own; returns the process as soon as the first pairs are written."""
    command = [sys.executable, *torchrun, ROOT / "mt.py", *words, "--out", "run"]
    process = subprocess.Popen(  # SIGINT may be ignored here, as in a shell's background jobs
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (folder / "run" / "round1" / "e1" / "pairs.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    return process

def contents(folder):
    """{name: contents} of all files and links in a run folder but run.json, times and the report."""
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
            for p in folder.rglob("*") if (p.is_symlink() or p.is_file())
            and p.name not in ("run.json", "timings.jsonl", "report.html", "report.png")}

# ---------------------------------------------------------------- kills
class Killed(BaseException):
    pass

def test_a_run_killed_before_and_after_every_rename_and_removal_ends_as_an_undisturbed_one(
        words, finished, tmp_path, monkeypatch):
    died = set()

    def deadly(work, number):
        """Make `work` kill the run before and after it is done, once for each value of argument `number`."""
        def once(*arguments, **more):
            place = (work.__name__, str(arguments[number]))
            for moment in ("before", "after"):
                if (moment, place) not in died:
                    died.add((moment, place))
                    if moment == "after":
                        work(*arguments, **more)
                    raise Killed
            return work(*arguments, **more)
        return once
    monkeypatch.setattr(run, "sources", dict)  # it takes half a second each time
    for module, name, number in ((os, "replace", 1), (shutil, "rmtree", 0), (Path, "unlink", 0)):
        monkeypatch.setattr(module, name, deadly(getattr(module, name), number))
    done = False
    while not done:
        with contextlib.suppress(Killed):
            run_to_its_end(words, tmp_path)
            done = True
    for name in ("samples.jsonl", "pairs.jsonl", "selection.json", "policy", "checkpoints"):
        assert ("after", ("replace", f"run/round1/e2/{name}")) in died
    assert contents(tmp_path / "run") == contents(finished)

def test_two_processes_of_which_one_is_killed_end_as_undisturbed_ones():
    done = subprocess.run([sys.executable, ROOT / "bench" / "kills.py", "--times", "2", "--processes", "2"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not one byte different" in done.stdout

def test_a_folder_in_use_is_refused_and_after_ctrl_c_the_same_command_finishes_the_run(
        words, finished, script, tmp_path):
    first = start_run(words, tmp_path)
    first.send_signal(signal.SIGSTOP)
    second = script("mt.py", *words, "--out", "run", cwd=tmp_path)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert "run is in use by another process; wait, or choose another --out" in second.stderr
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    said = first.communicate()[0]
    assert first.returncode == 130 and "Traceback" not in said
    assert said.endswith("\nmt.py: interrupted; the same command continues\n")
    assert not (tmp_path / "run" / "base.jsonl").exists()
    assert contents(run_to_its_end(words, tmp_path)) == contents(finished)

def test_torchrun_finishes_the_run_by_itself_after_a_worker_was_killed(words, finished, tmp_path):
    process = start_run(words, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                        "1", "--max-restarts", "3")
    [worker] = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True,
                              capture_output=True).stdout.split()[:1]
    os.kill(int(worker), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert contents(tmp_path / "run") == contents(finished)

def test_a_long_phase_says_at_most_every_half_minute_how_far_it_is(tmp_path, monkeypatch, capsys):
    seconds = itertools.count(0, 20)
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: next(seconds)))
    run.in_blocks([*range(8)], 2, tmp_path / "out.jsonl", lambda block: [{"tokens": 50}] * 2, "sampling")
    assert capsys.readouterr().out.splitlines() == [
        f"sampling: {done} of 4 blocks, about {rate} tokens a second" for done, rate in ((2, 2.5), (4, 2.9))]

SLOW = """
import sys, time
from common import run
from common.parallel import rank, world

def work(block):
    time.sleep(3 * (rank() == world() - 1))
    return [{"row": row} for row in block]

run.launch(lambda: run.in_blocks([*range(8)], 1, sys.argv[1], work, "rows"))
"""

def test_rank_0_waits_for_the_blocks_of_the_slowest_process(tmp_path, monkeypatch):
    (tmp_path / "slow_blocks.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    forked("slow_blocks", [str(tmp_path / "out.jsonl")], 8)
    assert read_jsonl(tmp_path / "out.jsonl") == [{"row": row} for row in range(8)]

# ---------------------------------------------------------------- disks
@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes) -> a folder on a file system of its own, which is resized to hold so much."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kilobytes):
        options = f"size={kilobytes}k" + ",remount" * folder.is_mount()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("no small disk: mounting needs root")
        return folder
    yield resize
    subprocess.run(["umount", folder], capture_output=True)

def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_when_there_is_room(
        words, small_disk, finished, script):
    ended, kept = [], {}
    for kilobytes in (30, 300, 10_000):
        disk = small_disk(kilobytes)
        done = script("mt.py", *words, "--out", disk / "run")
        found = contents(disk / "run")
        assert all(found[name] == kept[name] for name in kept if name.endswith("s.jsonl") and name[0] == "r")
        kept, ended = found, [*ended, done]
    assert [done.returncode for done in ended] == [2, 2, 0]
    for done in ended[:-1]:
        assert done.stderr.startswith("mt.py: ") and done.stderr.count("\n") == 1
        assert "space left" in done.stderr and "free some space and run the same command again" in done.stderr
    ours, theirs = contents(disk / "run"), contents(finished)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in theirs if name.endswith(".safetensors"))

def test_an_exceeded_quota_ends_a_script_in_one_line():
    error = "safetensors.SafetensorError('I/O error: Disk quota exceeded (os error 122)')"
    code = f"import safetensors\nfrom common import run\ndef main():\n raise {error}\nrun.launch(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "quota exceeded (os error 122); free some space and run the same command again" in done.stderr
