"""A script's command line and errors, files that are whole or not there, the log, and work in blocks."""
import argparse
import functools
import gc
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import MISSING, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

from data import Problem, first_line, quiet, read_jsonl, write_jsonl
from parallel import barrier, from_rank0, rank, say, start, world
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
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror}"
        elif isinstance(error, torch.cuda.OutOfMemoryError):
            error = ("out of GPU memory; run the same command with a smaller --sample_batch, --score_batch "
                     f"or --micro_batch ({first_line(error)})")
        if any(words in str(error) for words in ("o space left", "quota exceeded")):
            error = f"{error}; make room and run the same command again: what is finished stays"
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # no waiting for processes that are inside a collective
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"\n{Path(sys.argv[0]).name}: interrupted; what is finished stays, "
                  "and the same command goes on", file=sys.stderr, flush=True)
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


# ---------------------------------------------------------------- log, and work in blocks
def phase_of(line):
    """The phase of a log line; None if a kill or a full disk has cut it."""
    try:
        return json.loads(line)["phase"]
    except (ValueError, LookupError, TypeError):
        return None


def open_log(path, phase, every=0, report_to=""):
    """log(shown, **values): a JSON line for each event of a phase in the file `path`, and, of each `every`th
    step, `shown` on the screen; from rank 0. An earlier, broken-off attempt's lines are removed.
    report_to: wandb or tensorboard, which get the numbers as PHASE/NAME."""
    path = Path(path)
    if rank() == 0 and path.exists():
        lines = path.read_text(errors="replace").splitlines(True)
        write_text(path, "".join(line for line in lines if phase_of(line) not in (None, phase)))

    def log(shown="", **values):
        if rank() == 0:
            with open(path, "a") as file:
                file.write(json.dumps({"phase": phase, **values}) + "\n")
            if report_to:
                tracker(report_to, path.parent)({f"{phase}/{name}": value for name, value in values.items()
                                                 if type(value) in (int, float)}, values.get("step", 0))
            if shown and every and values["step"] % every == 0:
                with tqdm.external_write_mode():
                    print(f"{phase}  {shown}", flush=True)
    return log


def show(row, *sides):
    """Print a row's prompt and some of its texts, with their scores."""
    for key in ("prompt", *sides):
        score = f" [{row[f'{key}_score']:.3f}]" if key in sides else ""
        say(f"  {key}{score}: {str(row[key])[:300]!r}")


@functools.cache
def tracker(name, out):
    """send({name: number}, step)"""
    if name == "wandb":
        import wandb
        started = wandb.init(project="mutual-taught", name=out.name, dir=out)
        return lambda numbers, step: started.log(numbers)  # steps begin anew in every phase, wandb's must not
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(out / "tensorboard")

    def send(numbers, step):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()
    return send


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
    block that is done is kept: after an interruption only unfinished or damaged ones are made again."""
    out, parts = Path(out), parts_of(out)
    starts = range(0, len(rows), size)
    mine = [s for s in starts[rank()::world()]
            if not has_rows(parts / f"{size}-{s}.jsonl", each * min(size, len(rows) - s))]
    for s in tqdm(mine, desc=what, disable=quiet(), unit="block", leave=False):
        write_jsonl(parts / f"{size}-{s}.jsonl", work(rows[s:s + size]))
    with writing(out) as temporary:
        if rank() == 0:
            with open(temporary, "wb") as whole:
                whole.writelines((parts / f"{size}-{s}.jsonl").read_bytes() for s in starts)
    remove_all(parts)
