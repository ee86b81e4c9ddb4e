"""A script's command line and errors, its run folder, its log, and work in blocks that survives a kill."""
import argparse
import fcntl
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import MISSING, asdict, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

from data import Problem, first_line, read_jsonl, write_jsonl
from parallel import barrier, device, from_rank0, rank, start, world
from rows import check_flag


def launch(main, **arguments):
    """Run a script's main() in its process group; what a user can mend is one line and exit code 2."""
    try:
        start()
        gc.freeze()  # what imports made stays; looking through it costs 0.2 s for every model loaded
        main(**arguments)
        if dist.is_initialized():
            barrier()  # nobody leaves before rank 0 is done
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # past the group's threads, which now and then abort a regular exit
    except (Problem, OSError, SafetensorError, torch.cuda.OutOfMemoryError) as error:
        if rank() > 0:
            time.sleep(3)  # most problems are everybody's: rank 0 has spoken, and torchrun ends the others
        if "o space left" in str(error):
            error = f"{error}; make room and run the same command again: what is finished stays"
        elif isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror}"
        elif isinstance(error, torch.cuda.OutOfMemoryError):
            error = ("out of GPU memory; run the same command with a smaller --sample_batch, --score_batch "
                     f"or --micro_batch ({first_line(error)})")
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # no waiting for processes that are inside a collective
    except KeyboardInterrupt:
        os._exit(130)


def parse(options, words=None, **defaults):
    """The command line (or `words`) as the dataclass `options`; `defaults` replace the dataclass's own."""
    def complain(message):
        raise Problem(f"{message:.200} (see --help)")
    parser = HfArgumentParser(options, description=sys.modules[options.__module__].__doc__,
                              usage="%(prog)s [--flag VALUE …]", allow_abbrev=False, formatter_class=_Help)
    parser.error = complain
    parser.set_defaults(**defaults)
    for action in parser._actions[1:]:  # the help shows a flag once; --no_FLAG and dashes work all the same
        hidden = action.option_strings[0].startswith("--no_")
        action.help = argparse.SUPPRESS if hidden else action.help or "(default: %(default)s)"
        action.option_strings = action.option_strings[:1]
    chosen, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        complain(f"unknown: {' '.join(unknown)}")
    for name, value in vars(chosen).items():
        check_flag(name, value)
    return chosen


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def option(default=MISSING, help=""):
    """A field of a script's Options: its default (without one the flag must be given) and its help."""
    return field(default=default, metadata={"help": help})


# ---------------------------------------------------------------- files
def exists(path):
    """Rank 0's view, so that no process decides otherwise."""
    return from_rank0(Path(path).exists())


@contextmanager
def writing(path, go_on=False):
    """A temporary name for all processes to write to, renamed to `path` at the end: what exists is whole.
    go_on: with what an attempt before has left."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not go_on:
            remove(temporary)
    barrier()
    yield temporary
    barrier()
    if rank() == 0:
        os.replace(temporary, path)
    barrier()


def write_text(path, text):
    """Under a temporary name, then renamed: a file that exists is whole. For rank 0."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, value):
    if rank() == 0:
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    barrier()


def write_rows(path, rows):
    if rank() == 0:
        write_jsonl(path, rows)
    barrier()


def link(path, target):
    """A symbolic link, relative if it leads to a place in the same folder."""
    path, target = Path(path), Path(target)
    if rank() == 0:
        inside = target.resolve().is_relative_to(path.parent.resolve())
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target, path.parent) if inside else target.resolve())
        os.replace(temporary, path)
    barrier()


def remove(path):
    path = Path(path)
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def remove_all(*paths):
    if rank() == 0:
        for path in paths:
            remove(path)
    barrier()


# ---------------------------------------------------------------- what a result belongs to
LOCKS = {}  # path -> open file
ROUNDING = "sample_batch score_batch micro_batch recompute resume_every".split()  # these change no more


def note_of(path):
    """The file that says how `path`, a folder or a JSONL file, came about."""
    path = Path(path)
    return path.with_name(path.name + ".run.json") if path.suffix == ".jsonl" else path / "run.json"


def claim(path, options, file=False, **more):
    """Note down which settings and sources `path` belongs to; others are refused, with the differences.

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
        new = {"settings": {k: v for k, v in asdict(options).items() if k != "out"}, **more,
               "versions": versions(), "sources": sources()}
        files = [path, parts_of(path)] if file else path.glob("[!.]*")
        results = [p for p in files if p.exists() and p.name not in (note.name, "metrics.jsonl")]
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
    try:
        LOCKS[path] = open(path.with_name(f".{path.name}.lock"), "w")  # closing it would let go
        fcntl.lockf(LOCKS[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"{path} is in use by another process; wait, or choose another --out") from None
    except OSError:
        pass  # this file system knows no locks, or can't be written: the next line will say so


def read_note(note):
    try:
        value = json.loads(note.read_text())
        return {**value, "settings": {**value["settings"]}, "sources": {**(value.get("sources") or {})}}
    except (OSError, ValueError, LookupError, TypeError):
        raise Problem(f"{note} is damaged; choose another --out") from None


def check_same(path, old, new):
    """Refuse to go on with a run that has other settings or was made by other code."""
    def differences(key):
        theirs, ours = old[key], new[key]
        return {k: (theirs.get(k), ours.get(k)) for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)}
    changed = [f"{k}: {there!r} there, {now!r} now" for k, (there, now) in differences("settings").items()
               if k not in ROUNDING and not (k == "rounds" and there < now)]
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


def phase_of(line):
    """The phase of a log line; None if a kill or a full disk has cut it."""
    try:
        return json.loads(line)["phase"]
    except (ValueError, LookupError, TypeError):
        return None


def open_log(path, phase):
    """log(shown, **values): a JSON line for each event of a phase in the file `path`, and the line `shown` on
    the screen, filled in with the values; from rank 0. An earlier, broken-off attempt's lines are removed."""
    path = Path(path)
    if rank() == 0 and path.exists():
        lines = path.read_text(errors="replace").splitlines(True)
        write_text(path, "".join(line for line in lines if phase_of(line) not in (None, phase)))

    def log(shown="", **values):
        if rank() == 0:
            with open(path, "a") as file:
                file.write(json.dumps({"phase": phase, **values}) + "\n")
            if shown:
                print(f"{phase}  " + shown.format(**values), flush=True)
    return log


def parts_of(out):
    """The folder of a JSONL file's blocks while they are made."""
    return Path(out).with_name(f".{Path(out).name}.parts")


def has_rows(path, count):
    """Whether a JSONL file of our own is there and whole."""
    try:
        return [type(row) for row in read_jsonl(path)] == [dict] * count
    except (OSError, Problem):
        return False


def in_blocks(rows, size, out, work, what, each=1):
    """Write work(block)'s rows, `each` for every row of a block of `size`, to the JSONL file `out`; processes
    take blocks in turn. The blocks don't depend on their number, so neither do the shapes that models see. A
    block is kept as soon as it is done: after an interruption only unfinished or damaged ones are made again.
    """
    out, parts = Path(out), parts_of(out)
    starts = range(0, len(rows), size)
    mine = [s for s in starts[rank()::world()]
            if not has_rows(parts / f"{size}-{s}.jsonl", each * len(rows[s:s + size]))]
    for s in tqdm(mine, desc=what, disable=rank() > 0, unit="block", leave=False):
        write_jsonl(parts / f"{size}-{s}.jsonl", work(rows[s:s + size]))
    barrier()
    write_rows(out, chain.from_iterable(read_jsonl(parts / f"{size}-{s}.jsonl") for s in starts))
    remove_all(parts)
