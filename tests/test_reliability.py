"""pytest tests/test_reliability.py

Nothing lost, nothing wrong in silence: kills, damaged files, full disks, two runs at once.
"""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mt
from common import run
from common.data import read_jsonl, write_jsonl
from common.parallel import Problem
from common.run import in_blocks

ROOT = Path(__file__).parents[1]
WORDS = dict(rounds=1, samples=3, max_new_tokens=10, max_length=64, policy_batch=4, rm_batch=4, beta=0.1,
             policy_lr=1e-3, rm_lr=1e-3, save_every=1, select_prompts=6, tau=0.0, sample_batch=4, out="run")


@pytest.fixture(scope="module")
def words(tiny, prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": p} for p in prompts])
    settings = WORDS | dict(policy=tiny(), rm=tiny(reward=True), prompts=path)
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """A run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["mt.py", *words])
        mt.main()
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in ("run.json", "timings.jsonl", "report.html", "report.png")}


# ---------------------------------------------------------------- kills
@pytest.mark.parametrize("processes, times", [(1, 20), (2, 5)])
def test_killed_again_and_again_a_run_ends_as_an_undisturbed_one(processes, times):
    done = subprocess.run([sys.executable, ROOT / "bench" / "kills.py", "--times", str(times), "--processes",
                           str(processes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not one byte different" in done.stdout


def test_ctrl_c_says_that_the_same_command_goes_on_and_it_does(words, finished, tmp_path):
    command = [sys.executable, ROOT / "mt.py", *words]
    first = subprocess.Popen(  # a shell's background jobs, and so their children, don't hear of Ctrl-C
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (tmp_path / "run" / "round1" / "e1" / "pairs.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    said = first.communicate()[1]
    assert first.returncode == 130 and "Traceback" not in said
    assert said.endswith("\nmt.py: interrupted; what is finished stays, and the same command goes on\n")
    assert not (tmp_path / "run" / "report.html").exists()
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "\ngoing on: round 1, E-step\n" in again
    assert contents(tmp_path / "run") == contents(finished)


def test_torchrun_goes_on_by_itself_after_a_worker_was_killed(words, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
               "--max-restarts", "3", ROOT / "mt.py", *words]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    pairs = tmp_path / "run" / "round1" / "e1" / "pairs.jsonl"
    while not pairs.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    [worker] = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True,
                              capture_output=True).stdout.split()[:1]
    os.kill(int(worker), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert contents(tmp_path / "run") == contents(finished)


# ---------------------------------------------------------------- two at once
def test_a_folder_in_use_is_refused_in_a_line_and_free_again_after_a_kill(tmp_path):
    code = ("import sys, time, dataclasses; sys.path.insert(0, sys.argv[1]); import manifest\n"
            "manifest.claim(sys.argv[2], dataclasses.make_dataclass('O', ['a'])(1))\n"
            "print('claimed', flush=True); time.sleep(float(sys.argv[3]))")

    def claim(seconds):
        return subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path / "run", str(seconds)],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = claim(60)
    assert first.stdout.readline() == "claimed\n"
    second = claim(0)
    assert f"{tmp_path / 'run'} is in use by another process; wait" in second.communicate()[1]
    first.kill()
    first.wait()
    third = claim(0)
    assert third.wait() == 0


def test_where_there_are_no_locks_a_heartbeat_tells_of_another_process(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    file = tmp_path / ".run.lock"
    monkeypatch.setattr(manifest.fcntl, "lockf", no_locks)
    monkeypatch.setattr(manifest, "HEARTBEAT", 0.3)
    manifest.lock(tmp_path / "run")
    time.sleep(1.2)  # longer than what a dead process is waited for
    with pytest.raises(Problem, match="in use by another process, or was 0 seconds ago; wait 0.* seconds"):
        manifest.lock(tmp_path / "run")
    monkeypatch.setattr(manifest, "beat", lambda file: None)  # from here on, nobody is alive
    os.utime(file, (0, 0))
    manifest.lock(tmp_path / "run")


# ---------------------------------------------------------------- damaged files
def cut(path):
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name, damage, delete", [
    ("prompts/s1.jsonl", cut, ["prompts/s1.jsonl", "round1/e1", "round1/m", "round1/e2"]),
    ("round1/e1/samples.jsonl", cut, ["round1/e1/samples.jsonl", "round1/e1/pairs.jsonl", "round1/m"]),
    ("round1/e1/pairs.jsonl", cut, ["round1/e1/pairs.jsonl", "round1/e1/selection.json", "round1/m"]),
    ("round1/e1/selection.json", lambda p: p.write_text(""), ["round1/e1/selection.json", "round1/m"]),
    ("round1/e1/selection.json", lambda p: p.write_text("{}"), ["round1/e1/selection.json", "round1/m"]),
    ("round1/e1/selection.json", lambda p: p.write_text("[]"), ["round1/e1/selection.json", "round1/m"]),
    ("round1/e1/policy/model.safetensors", truncate, ["round1/e1/policy", "round1/m", "round1/e2"]),
    ("round1/m/new.jsonl", cut, ["round1/m/new.jsonl", "round1/m/comparisons.jsonl", "round1/e2"]),
    ("round1/m/preferences.jsonl", flip, ["round1/m/preferences.jsonl", "round1/m/rm", "round1/e2"]),
    ("round1/m/rm/model.safetensors", flip, ["round1/m/rm", "round1/e2"]),
    ("round1/m/rm/config.json", truncate, ["round1/m/rm", "round1/e2"]),
    ("round1/e2/policy/model.safetensors", truncate, ["round1/e2/policy"]),
])
def test_a_result_that_is_not_what_was_written_is_refused_with_what_to_delete(
        call, words, copy, name, damage, delete):
    damage(copy / name)
    with pytest.raises(Problem) as problem:
        call(mt, *words)
    said, paths = str(problem.value).split("; to make it again delete ")
    assert said.startswith(f"run/{delete[0]} is not what was written (") and "\n" not in paths
    assert {f"run/{path}" for path in delete} <= set(paths.split())


@pytest.mark.parametrize("name, damage, lines", [
    ("round1/m/comparisons.jsonl", cut, 1),
    ("round1/e1/policy/model.safetensors", truncate, 2)])  # the second one: it is gone
def test_what_was_refused_comes_back_the_same_when_the_line_is_followed(
        call, words, copy, finished, name, damage, lines):
    damage(copy / name)
    for _ in range(lines):
        with pytest.raises(Problem) as problem:
            call(mt, *words)
        for path in re.findall(r"run/\S+", str(problem.value).split(" delete ")[1]):
            run.remove(path)
    call(mt, *words)
    assert contents(copy) == contents(finished)
    for link in ("policy", "rm"):
        assert os.readlink(copy / link) == os.readlink(finished / link)


def test_broken_lines_of_the_log_do_no_harm(call, words, copy):
    before = (copy / "metrics.jsonl").read_text()
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('[1]\n{}\nnull\n\x00\x00\n{"phase": "round1/e2/pa')
    for gone in ("round1/e2", "report.html"):
        run.remove(copy / gone)
    call(mt, *words)
    assert (copy / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damage", [lambda p: p.write_text(""), cut, lambda p: p.write_text("null\n" * 4),
                                    lambda p: p.write_bytes(b"\xff\x00"), lambda p: p.write_text("{")])
def test_a_damaged_block_is_made_again(tmp_path, damage):
    out, calls = tmp_path / "out.jsonl", []

    def work(block):
        calls.append(block)
        if block[0] == 6 and len(calls) < 5:
            raise KeyboardInterrupt
        return [{"row": row, "copy": i} for row in block for i in range(2)]
    with pytest.raises(KeyboardInterrupt):
        in_blocks(list(range(10)), 2, out, work, "test", each=2)
    damage(run.parts_of(out) / "2-2.jsonl")
    in_blocks(list(range(10)), 2, out, work, "test", each=2)
    assert [row["row"] for row in read_jsonl(out)] == [i for i in range(10) for _ in range(2)]
    assert [block[0] for block in calls] == [0, 2, 4, 6, 2, 6, 8]  # only what was missing or damaged


def test_what_an_earlier_attempt_left_is_not_taken_for_a_result_made_from_something_newer(tmp_path):
    write_jsonl(tmp_path / "run.json", [dict(settings={})])
    source, result = tmp_path / "round1" / "pairs.jsonl", tmp_path / "round1" / "samples.jsonl"
    leftovers = [result.with_name(name) for name in (".samples.jsonl.parts", "samples.unscored.jsonl")]
    for again in (False, True):
        assert manifest.due(tmp_path, source)
        write_jsonl(source, [{"again": again}])
        manifest.done(tmp_path, source)
        assert manifest.due(tmp_path, result, source)  # begun, and broken off
        assert not any(path.exists() for path in leftovers)
        for path in leftovers:
            path.write_text("")
        assert manifest.due(tmp_path, result, source) and all(path.exists() for path in leftovers)
        source.unlink()


def test_a_manifest_knows_every_result_of_a_run(finished):
    made = json.loads((finished / "run.json").read_text())["made"]
    for path in [*finished.glob("round*/*/*.json*"), *finished.glob("prompts/*"), *finished.glob("*/*/rm"),
                 *finished.glob("*/*/policy"), *finished.glob("*/*/select/*")]:
        assert made[str(path.relative_to(finished))] == manifest.digest(path)
    rows = read_jsonl(finished / "round1" / "e1" / "samples.jsonl")
    assert made["round1/e1/samples.jsonl"]["rows"] == len(rows) == 24


# ---------------------------------------------------------------- disks
@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes): a folder on a file system of its own that holds so much."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kilobytes, *more):
        options = ",".join([f"size={kilobytes}k", *more])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("no small disk: mounting needs root")
        return folder
    yield resize
    subprocess.run(["umount", folder], capture_output=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
        words, small_disk, finished, tmp_path):
    disk, ended, kilobytes = small_disk(30), [], 30
    command = [sys.executable, ROOT / "mt.py", *words, "--out", disk / "run"]
    done = None
    while not done or done.returncode:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            assert "mt.py: " in done.stderr.splitlines()[-1] and "space left" in done.stderr.splitlines()[-1]
            kilobytes *= 2
            small_disk_again(disk, kilobytes)
            ended.append(kilobytes)
    assert len(ended) >= 3
    ours, theirs = contents(disk / "run"), contents(finished)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in theirs if name.endswith(".safetensors"))


def small_disk_again(disk, kilobytes):
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)


@pytest.mark.parametrize("error", [
    "OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), 'samples.jsonl')",
    "safetensors.SafetensorError('I/O error: Disk quota exceeded (os error 122)')"])
def test_a_quota_is_one_line(error):
    code = f"import errno, os, run, safetensors\ndef main():\n raise {error}\nrun.launch(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "quota exceeded" in done.stderr and "; make room and run the same command again" in done.stderr


def test_a_read_only_disk_is_one_line(words, small_disk, tmp_path):
    disk = small_disk(100, "ro")
    done = subprocess.run([sys.executable, ROOT / "mt.py", *words, "--out", disk / "run"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Read-only file system" in done.stderr and done.stderr.count("\n") == 1
