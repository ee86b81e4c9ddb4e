"""What run.json says of a run: its settings and sources, and its results with their digests, in the order of
their making (`made`).

So a run goes on only with the same settings and code, and not twice at a time; and no phase builds on what is
older than its own sources, or on a file that is not what was written.
"""
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

from data import Lines, Problem
from parallel import barrier, device, from_rank0, rank, world
from run import parts_of, remove, write_text

# ---------------------------------------------------------------- settings and sources
LOCKS = {}  # path -> open file
HEARTBEAT = 20  # seconds
# these change rounding at most
ROUNDING = "sample_batch score_batch micro_batch recompute resume_every log_every report_to".split()


def note_of(path):
    """The file that says how `path`, a folder or a JSONL file, came about."""
    path = Path(path)
    return path.with_name(path.name + ".run.json") if path.suffix == ".jsonl" else path / "run.json"


def claim(path, options, file=False, **more):
    """Note down which settings, files and sources `path` belongs to; others are refused, by their names.

    file: whether `path` is a JSONL file, else it is a folder. A run may go on with other batch sizes and with
    more rounds.
    """
    path, note = Path(path), note_of(path)
    if (path.suffix == ".jsonl") != file:
        raise Problem(f"--out {path}: " + ("a file is written; its name must end in .jsonl" if file else
                                           "a folder is written; its name must not end in .jsonl"))
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock(path)
        settings = {k: v for k, v in asdict(options).items() if k != "out"}
        inputs = {k: digest(v)["sha256"] for k, v in settings.items()
                  if isinstance(v, str) and k != "labeller" and os.path.isfile(v)}
        new = {"settings": settings, "inputs": inputs, **more, "versions": versions(), "sources": sources()}
        files = [path, parts_of(path)] if file else path.glob("[!.]*")
        logs = (note.name, "metrics.jsonl", "timings.jsonl")
        results = [p for p in files if p.exists() and p.name not in logs]
        if results and not note.exists():
            raise Problem(f"{path} exists and was not written by this command; choose another --out")
        if results:  # without them, it is of a failed start
            old = read_note(note)
            check_same(path, old, new)
            new |= {key: value for key, value in old.items() if value}
            new["settings"] |= {"rounds": options.rounds} if hasattr(options, "rounds") else {}
        text = json.dumps(new, indent=1) + "\n"
        if not note.exists() or note.read_text() != text:
            write_text(note, text)
    barrier()


def lock(path):
    """Hold `path` until this process ends, however it ends; another process that holds it is a Problem."""
    path = path.resolve()
    file = path.with_name(f".{path.name}.lock")
    quiet_for = time.time() - file.stat().st_mtime if file.exists() else math.inf
    try:
        LOCKS[path] = open(file, "a")  # closing it would let go
        fcntl.lockf(LOCKS[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"{path} is in use by another process; wait, or choose another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return  # it can't be written: the next line will say so
        if quiet_for < 3 * HEARTBEAT:
            raise Problem(f"{path} is in use by another process, or was {quiet_for:.0f} seconds ago; wait "
                          f"{3 * HEARTBEAT} seconds, or choose another --out") from None
        threading.Thread(target=beat, args=[file], daemon=True).start()


def beat(file):
    """Where a file system has no locks, the time of the file says that its process lives."""
    while True:
        file.touch()
        time.sleep(HEARTBEAT)


def read_note(note):
    try:
        value = json.loads(note.read_text())
        return {**value, "settings": {**value["settings"]},
                **{key: {**(value.get(key) or {})} for key in ("inputs", "sources")}}
    except (OSError, ValueError, LookupError, TypeError):
        raise Problem(f"{note} is damaged; choose another --out") from None


def check_same(path, old, new):
    """Refuse to go on with a run that has other settings or was made by other code."""
    def differences(key):
        theirs, ours = old[key], new[key]
        return {k: (theirs.get(k), ours.get(k)) for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)}
    changed = [f"{k}: {there!r} there, {now!r} now" for k, (there, now) in differences("settings").items()
               if k not in ROUNDING and not (k == "rounds" and (there or 0) < (now or 0))]
    changed += [f"the file of --{k} is another one" for k, both in differences("inputs").items() if all(both)]
    files = differences("sources") if old["sources"] else ()
    if files:
        raise Problem(f"{path} was made by other code, {', '.join(files)} changed since; choose another "
                      f"--out (to go on all the same, take \"sources\" out of {note_of(path)})")
    if changed:
        raise Problem(f"{path} belongs to another run; choose another --out ({'; '.join(changed)})")


def sources():
    """{file: digest} of the project's modules in use and of the script, without those that only look."""
    home = Path(__file__).resolve().parent
    files = {Path(m.__file__).resolve() for m in [*sys.modules.values()] if getattr(m, "__file__", None)}
    ours = {os.path.relpath(f, home): f for f in files if f.is_file() and (
        f.parent in (home, home / "variants") or f == Path(sys.argv[0]).resolve())}
    return {name: hashlib.sha256(ours[name].read_bytes()).hexdigest()[:16] for name in sorted(ours)}


def versions():
    names = {"python": sys.version.split()[0], "torch": torch.__version__,
             "transformers": transformers.__version__, "numpy": np.__version__,
             "processes": world(), "device": str(device())}
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True,
                         cwd=Path(__file__).parent, capture_output=True) if shutil.which("git") else None
    return {**names, "commit": git.stdout.strip() if git and git.returncode == 0 else None}


# ---------------------------------------------------------------- results
def due(out, path, *made_from):
    """Whether the result `path` of a phase is still to be made. One that is older than what it was made from
    is a Problem.

    made_from: results, or folders of results, of which the newest counts; what is outside `out` doesn't.
    """
    return on_rank0(_due, Path(out), path, made_from)


def done(out, path):
    """Note down the digest of a result that is there; one that is not what was noted is a Problem.
    Returns `path`."""
    on_rank0(_done, Path(out), path)
    return path


def on_rank0(work, *arguments):
    answer = from_rank0(work(*arguments) if rank() == 0 else None)
    if isinstance(answer, str):
        raise Problem(answer)
    return answer


def _due(out, path, made_from):
    note, name = read_note(note_of(out)), os.path.relpath(path, out)
    made = note.setdefault("made", {})
    later = list(made)[list(made).index(name) + 1:] if name in made else list(made)
    sources = [os.path.relpath(source, out) for source in made_from]
    newer = [other for other in later if any(other == s or other.startswith(f"{s}/") for s in sources)]
    if Path(path).exists() and not newer:
        return False
    if Path(path).exists():
        older = [name, *later[:later.index(newer[0])]]
        return (f"{path} is older than {out / newer[0]}, which it was made from; to make it again delete "
                f"{listed(out, older, Path(newer[0]).parent)}")
    if name in made and newer:  # what an attempt before left was made from something else
        for leftover in Path(path).parent.glob(f"*{Path(path).stem}.*"):
            if os.path.relpath(leftover, out) not in sources:
                remove(leftover)
    made.pop(name, None)
    made[name] = None  # last, so newer than all others
    write_text(note_of(out), json.dumps(note, indent=1) + "\n")
    return True


def _done(out, path):
    note, name = read_note(note_of(out)), os.path.relpath(path, out)
    made, found = note.setdefault("made", {}), digest(path)
    if made.get(name) is None:
        made[name] = found
        write_text(note_of(out), json.dumps(note, indent=1) + "\n")
    elif made[name] != found:
        later = list(made)[list(made).index(name):]
        return (f"{path} is not what was written ({made[name]['bytes']} bytes then, {found['bytes']} now); "
                f"to make it again delete {listed(out, later, Path(name).parent)}")


def listed(out, names, folder):
    """Paths to delete: in `folder` one by one, elsewhere whole steps."""
    paths = {p if p.parent == folder else Path(*p.parts[:2]) for p in map(Path, names)}
    return " ".join(sorted(str(out / p) for p in paths))


def digest(path):
    """{bytes, sha256} of a file or of all files of a folder, with their names; and the rows of JSONL."""
    path, size, total = Path(path), 0, hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                inner = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(f"{file.relative_to(path)} {inner}\n".encode())
            size += file.stat().st_size
    rows = {"rows": len(Lines(path))} if path.suffix == ".jsonl" else {}
    return {"bytes": size, **rows, "sha256": total.hexdigest()}
