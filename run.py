"""A script's command line and errors, its run folder, its log, and work in blocks that survives a kill."""
import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser

from data import Problem, first_line, read_jsonl, write_jsonl
from parallel import barrier, device, from_rank0, rank, start, world


def launch(main, *arguments):
    """Run a script's main() in its process group; what a user can mend is one line and exit code 2."""
    try:
        start()
        gc.freeze()  # what imports made stays; looking through it costs 0.2 s for every model loaded
        main(*arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Problem, OSError, torch.cuda.OutOfMemoryError) as error:
        if rank() > 0:
            time.sleep(3)  # most problems are everybody's: rank 0 has spoken, and torchrun ends the others
        if isinstance(error, torch.cuda.OutOfMemoryError):
            error = ("out of GPU memory; run the same command with a smaller --sample_batch, "
                     f"--score_batch or --micro_batch ({first_line(error)})")
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # no waiting for processes that are inside a collective
    except KeyboardInterrupt:
        os._exit(130)


def parse(options, words=None, **defaults):
    """The command line (or `words`) as the dataclass `options`; `defaults` replace the dataclass's own."""
    def complain(message):
        raise Problem(f"{message} (see --help)")
    parser = HfArgumentParser(options, description=sys.modules[options.__module__].__doc__,
                              allow_abbrev=False, formatter_class=_Help)
    parser.error = complain
    parser.set_defaults(**defaults)
    chosen, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        complain(f"unknown: {' '.join(unknown)}")
    for name, value in vars(chosen).items():
        if type(value) in (int, float) and name not in ("seed", "tau") and (
                value < 0 or value == 0 and name not in ("temperature", "select_prompts")
                or value > 1 and name == "top_p"):
            complain(f"--{name} {value} makes no sense")
    return chosen


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


# ---------------------------------------------------------------- files
def exists(path):
    """Rank 0's view, so that no process decides otherwise."""
    return from_rank0(Path(path).exists())


@contextmanager
def writing(path):
    """A temporary name for all processes to write to, renamed to `path` at the end: what exists is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    barrier()
    yield temporary
    barrier()
    if rank() == 0:
        os.replace(temporary, path)
    barrier()


def write_json(path, value):
    with writing(path) as temporary:
        if rank() == 0:
            text = json.dumps(value, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def remove(path):
    path = Path(path)
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def move_up(folder, out):
    """A finished model's files from out/… to `out`, config last: a folder with a config.json is complete."""
    if rank() == 0:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, out / path.name)
        remove(out / folder.relative_to(out).parts[0])
    barrier()


ROUNDING = ("sample_batch", "score_batch", "micro_batch", "recompute")  # options that change nothing else


def claim(path, options, file=False, **more):
    """Note down which configuration `path` belongs to; another one is refused with the differences listed.

    file: whether `path` is a JSONL file, else it is a folder. A run may go on with other batch sizes.
    """
    path = Path(path)
    if (path.suffix == ".jsonl") != file:
        raise Problem(f"--out {path}: " + ("a file is written; its name must end in .jsonl" if file else
                                           "a folder is written; its name must not end in .jsonl"))
    note = path.with_name(path.name + ".run.json") if path.suffix == ".jsonl" else path / "run.json"
    settings = {k: v for k, v in asdict(options).items() if k != "out"}
    files = [path, parts_of(path)] if path.suffix == ".jsonl" else path.glob("[!.]*")
    results = [p for p in files if p.exists() and p.name not in (note.name, "metrics.jsonl")]
    if rank() == 0 and note.exists() and results:  # without them, of a failed start
        try:
            old = json.loads(note.read_text())["settings"]
        except (ValueError, LookupError, TypeError):
            raise Problem(f"{note} is damaged; choose another --out") from None
        changed = [f"{k}: {old.get(k)!r} there, {settings.get(k)!r} now"
                   for k in {**old, **settings} if old.get(k) != settings.get(k) and k not in ROUNDING]
        if changed:
            raise Problem(f"{path} belongs to another run; choose another --out ({'; '.join(changed)})")
    elif rank() == 0:
        if results:
            raise Problem(f"{path} exists and was not written by this command; choose another --out")
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".{note.name}.tmp")
        value = {"settings": settings, **more, "versions": versions()}
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, note)
    barrier()


def versions():
    names = {"python": sys.version.split()[0], "torch": torch.__version__,
             "transformers": transformers.__version__, "numpy": np.__version__,
             "processes": world(), "device": str(device())}
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True,
                         cwd=Path(__file__).parent, capture_output=True) if shutil.which("git") else None
    return {**names, "commit": git.stdout.strip() if git and git.returncode == 0 else None}


class Log:
    """One line per optimiser step on the screen, one JSON line per event in a file. Rank 0 only.

    Lines of the same phase from an earlier, broken-off attempt are removed first.
    """
    def __init__(self, path, phase):
        self.path, self.phase = Path(path), phase
        if rank() == 0 and self.path.exists():
            lines = self.path.read_text().splitlines(True)
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
            temporary.write_text("".join(line for line in whole if json.loads(line)["phase"] != phase))
            os.replace(temporary, self.path)

    def __call__(self, shown="", **values):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"phase": self.phase, **values}) + "\n")
            if shown:
                print(f"{self.phase}  " + shown.format(**values), flush=True)


def parts_of(out):
    """The folder of a JSONL file's blocks while they are made."""
    return Path(out).with_name(f".{Path(out).name}.parts")


def in_blocks(rows, size, out, work, what):
    """Write work(block)'s rows for every block of `size` rows to the JSONL file `out`, processes in turn.

    The blocks don't depend on the number of processes, so neither do the shapes that models see. A block is
    kept as soon as it is done: after an interruption only unfinished blocks are computed again.
    """
    out, parts = Path(out), parts_of(out)
    starts = range(0, len(rows), size)
    mine = [s for s in starts[rank()::world()] if not (parts / f"{size}-{s}.jsonl").exists()]
    for s in tqdm(mine, desc=what, disable=rank() > 0, unit="block", leave=False):
        write_jsonl(parts / f"{size}-{s}.jsonl", work(rows[s:s + size]))
    barrier()
    if rank() == 0:
        write_jsonl(out, chain.from_iterable(read_jsonl(parts / f"{size}-{s}.jsonl") for s in starts))
        remove(parts)
    barrier()
