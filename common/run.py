"""What every script needs: the command line, errors in one line, files that are never half written, phases,
run.json, a log, and work in blocks.

run.json has the digests of each result and of what it was made from, so that nothing is built on a result
that is damaged or out of date.
"""
import argparse
import ast
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.hf_argparser import string_to_bool

from common.data import first_line, write_jsonl, write_text
from common.parallel import Problem, barrier, device, on_rank0, quiet, rank, say, start, world

HOME = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- command line
def launch(main, **arguments):
    """Run a script's main(). Errors that a user can mend are shown as one line, with exit code 2."""
    name = Path(sys.argv[0]).name
    try:
        start()
        main(**arguments)
        if dist.is_initialized():
            barrier()  # torchrun ends all processes when one leaves, so they leave together
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # a regular exit is now and then aborted by the group's threads
    except (Problem, OSError, SafetensorError, torch.cuda.OutOfMemoryError) as error:
        if rank() > 0:
            time.sleep(3)  # most problems occur in all processes; let rank 0 alone report them
        text = str(error) if isinstance(error, Problem) else first_line(error)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            text += "; use a smaller --micro_batch (sampler.py: --sample_batch; mt.py: also --score_batch)"
        elif "o space left" in text or "quota exceeded" in text:
            text += "; free some space and run the same command again: what is finished is kept"
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        os._exit(2)  # a regular exit would wait for processes that are inside a collective
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"\n{name}: interrupted; the same command continues", file=sys.stderr, flush=True)
        os._exit(130)

def option(default=MISSING, help="", group=None):
    """A field of a script's Options, with its default and its help. A flag without a default must be given.
    group: in --help, the heading above this flag and those after it."""
    return field(default=default, metadata={"help": help, "group": group})

def parse(options, words=None, about=None, **defaults):
    """Parse the command line, or `words`, into the dataclass `options`. about: the text of --help (default:
    the docstring of the dataclass's module). defaults: they replace those of the dataclass."""
    def complain(message):
        raise Problem(f"{message:.200} (see --help)")

    parser = argparse.ArgumentParser(
        description=about or sys.modules[options.__module__].__doc__, usage="%(prog)s [--flag VALUE …]",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, group = complain, parser
    for f in filter(lambda f: f.init, fields(options)):
        if f.metadata.get("group"):
            group = parser.add_argument_group(f.metadata["group"])
        default = defaults.get(f.name, f.default)
        shown = "" if default in (MISSING, None, "") else f" (default: {default})"
        group.add_argument(f"--{f.name}", required=default is MISSING, default=default, metavar="VALUE",
                           help=(f.metadata.get("help", "") + shown).replace("%", "%%"),
                           **KINDS.get(f.type, dict(type=f.type)))
    words = [re.sub("^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), str(word))
             for word in (sys.argv[1:] if words is None else words)]
    chosen = options(**vars(parser.parse_args(words)))
    for name, value in vars(chosen).items():
        check_number(name, value)
    return chosen

KINDS = {bool: dict(type=string_to_bool, nargs="?", const=True), list[str]: dict(type=str, nargs="+"),
         float | None: dict(type=float)}  # how argparse reads a field of this type

def check_number(name, value):
    """Refuse numbers that make no sense for a flag: not finite, negative, or counts that never end."""
    most = {"seed": 2**63 - 1, "top_p": 1, "prior": 100}.get(name, 10**6 if type(value) is int else 1e99)
    least = 1e-3 if name == "temperature" else 0
    or_zero = name in ("seed", "tau", "temperature", "select_prompts", "prior")
    if type(value) in (int, float) and not (0 < value <= most and least <= value or or_zero and value == 0):
        raise Problem(f"--{name} {value:.9g} is out of range: above {least}, to {most}{', or 0' * or_zero}")

# ---------------------------------------------------------------- files
def exists(path):
    """Whether the path exists for rank 0, so that all processes get the same answer."""
    return on_rank0(Path(path).exists)

@contextmanager
def writing(path):
    """Give all processes a temporary path to write to, and rename it to `path` when it is complete."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    yield temporary
    barrier()
    on_rank0(os.replace, temporary, path)

def write_json(path, value):
    on_rank0(write_text, path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

def write_rows(path, rows):
    on_rank0(write_jsonl, path, rows)

def link(path, target):
    """Make a link, a relative one, so that the folder with both ends can be moved. For one process."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    delete(temporary)
    temporary.symlink_to(os.path.relpath(Path(target).resolve(), temporary.parent.resolve()))
    os.replace(temporary, path)

def delete(*paths):
    """Delete those of the files and folders that exist. For one process."""
    for path in map(Path, paths):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

def remove(*paths):
    """`delete`, for all processes together."""
    on_rank0(delete, *paths)

# ---------------------------------------------------------------- run.json
ROUNDING = "sample_batch score_batch micro_batch recompute".split()  # flags that change nothing but rounding
LOCKS = []  # open lock files: they lock the outputs of this process until it ends

def note_of(path):
    """The file run.json of the output `path`, which is a folder or a JSONL file."""
    return Path(f"{path}.run.json") if str(path).endswith(".jsonl") else Path(path) / "run.json"

def read_note(path):
    try:
        note = json.loads(note_of(path).read_text())
        return note | {key: dict(note[key]) for key in ("settings", "inputs", "sources", "results")}
    except (OSError, ValueError, LookupError, TypeError):
        raise Problem(f"{note_of(path)} is damaged or missing; choose another --out") from None

def claim(path, options, file=False, **more):
    """Write run.json for the output `path`, with the settings, the digests of input files and of code, and
    `more`. If there is an earlier output by other settings, files or code, raise a Problem that names them.

    file: whether `path` is a JSONL file; else it is a folder. A run may be continued with other batch sizes
    per process and with more rounds. options.overwrite deletes the earlier output first, if it is ours."""
    if str(path).endswith(".jsonl") != file:
        raise Problem(f"--out {path}: the name of a file must end in .jsonl, and that of a folder must not")
    on_rank0(_claim, Path(path), options, more)

def _claim(path, options, more):
    lock(path.resolve())
    digest.cache_clear()
    settings = {k: v for k, v in asdict(options).items() if k not in ("out", "overwrite")}
    inputs = {f"file of --{k}": digest(v) for k, v in settings.items() if os.path.isfile(str(v))}
    new = dict(settings=settings, inputs=inputs, sources=sources(), **more, results={}, versions=dict(
        python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__,
        numpy=np.__version__, processes=world(), device=str(device()), commit=commit()))
    found = [path, parts_of(path)] if path.suffix == ".jsonl" else path.glob("[!.]*")  # hidden: temporary
    found = [p for p in found if p.exists()]
    made = [p for p in found if p.name not in ("run.json", "metrics.jsonl", "timings.jsonl")]
    if made and not note_of(path).exists():
        raise Problem(f"{path} exists and was not written by this command; choose another --out")
    old = read_note(path) if made else new
    if getattr(options, "overwrite", False):
        delete(*found)
    else:
        changed = [f"{key}: {old[part].get(key)!r} there, {new[part].get(key)!r} now"
                   for part in ("settings", "inputs", "sources") for key in {**old[part], **new[part]}
                   if old[part].get(key) != new[part].get(key) and key not in ROUNDING
                   and not (key == "rounds" and old[part].get(key, 0) < new[part].get(key, 0))]
        if changed:
            anew = ", or begin anew by --overwrite" * hasattr(options, "overwrite")
            raise Problem(f"{path} belongs to other settings, files or code; choose another --out{anew} "
                          f"({'; '.join(changed)})")
        new = old | {"settings": old["settings"] | {k: v for k, v in settings.items() if k == "rounds"}}
    write_text(note_of(path), json.dumps(new, indent=1) + "\n")

def lock(path):
    """Lock `path` until this process ends, however it ends. Raise a Problem if another one has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    LOCKS.append(open(path.with_name(f".{path.name}.lock"), "a"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"{path} is in use by another process; wait, or choose another --out") from None
    except OSError:
        pass  # this file system has no locks

def sources():
    """{file: digest} of the script and the loaded modules, but for eval.py and evals/: they train nothing."""
    files = {Path(m.__file__).resolve() for m in [*sys.modules.values()] if getattr(m, "__file__", None)}
    ours, script = (HOME, HOME / "common", HOME / "variants"), Path(sys.argv[0]).resolve()
    return {os.path.relpath(file, HOME): code_of(file) for file in sorted(files - {HOME / "eval.py"})
            if (file.parent in ours or file == script) and file.is_file()}  # torch.classes is no file

def code_of(file):
    """The digest of a Python file. Comments, docstrings and layout don't change it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]

def commit():
    if shutil.which("git"):
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                              cwd=HOME, text=True, capture_output=True).stdout.strip()

@functools.cache  # until the next `claim`
def digest(path):
    """The SHA-256 of a file, or of the names and contents of all files in a folder."""
    path, total = Path(path), hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                inner = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(f"{file.relative_to(path)} {inner}\n".encode())
    return total.hexdigest()

# ---------------------------------------------------------------- phases
def phase(work):
    """Make work(o, *sources, path, **more) a phase. It writes the result `path` in the run folder o.out, if
    that is not there yet, and returns `path` as text.

    sources: other results of the run, or models from outside, which count as settings. If the result or one
    of them has changed since, a Problem names what to delete. `work` may return a sentence to print, or
    (sentence, tokens) to print a rate as well."""
    @functools.wraps(work)
    def once(o, *arguments, path=None, **more):
        *made_from, path = map(Path, [*arguments, path] if path else arguments)
        begun = on_rank0(_begin, Path(o.out), made_from, path)
        if begun:
            start = time.time()
            facts = work(o, *made_from, path, **more)
            on_rank0(_end, o, path, facts, time.time() - start, begun)
        return str(path)
    return once

@contextmanager
def results_of(out):
    """The entries of the results in run.json. Changes to them are written."""
    note = read_note(out)
    yield note["results"]
    write_text(note_of(out), json.dumps(note, indent=1) + "\n")

def _begin(out, made_from, path):
    """Return '' if the result exists and is in order, else 'now', or 'again' after an interrupted attempt."""
    name = os.path.relpath(path, out)
    inside = [source for source in made_from if source.resolve().is_relative_to(out.resolve())]
    made_from = {os.path.relpath(source, out): digest(source) for source in inside}
    with results_of(out) as results:
        entry = results.get(name)
        if not path.exists():
            if entry and entry["made_from"] != made_from:
                delete(*leftovers(path))
            results[name] = {"made_from": made_from}
            return "again" if entry else "now"
        if not entry:
            raise Problem(f"{path} exists, but this run has not written it; delete it or move it away")
        changed = [source for source in made_from if entry["made_from"].get(source) != made_from[source]]
        if changed:
            raise Problem(f"{path} is not made from this {out / changed[0]}; {to_delete(out, results, name)}")
        if "sha256" not in entry:  # the run was killed after the result was written and before it was noted
            delete(*leftovers(path))
        if entry.setdefault("sha256", digest(path)) != digest(path):
            raise Problem(f"{path} has changed since it was written; {to_delete(out, results, name)}")
    return ""

def _end(o, path, facts, seconds, begun):
    out, name, line = Path(o.out), name_of(o, path), {"seconds": round(seconds, 3)}
    delete(*leftovers(path))
    with results_of(out) as results:
        results[os.path.relpath(path, out)]["sha256"] = digest(path)
    logged = [row.get("num_tokens", 0) for row in log_lines(out / "metrics.jsonl") if row["phase"] == name]
    facts, tokens = facts if isinstance(facts, tuple) else (facts, max(logged, default=0))  # of a training
    if tokens and begun == "now":  # otherwise an earlier attempt has made some of the tokens
        line |= dict(tokens=tokens, tokens_per_second=round(tokens / seconds, 1))
    with open(out / "timings.jsonl", "a") as file:
        file.write(json.dumps({"phase": name, **line}) + "\n")
    rate = ", {tokens_per_second:.0f} tokens a second".format(**line) if "tokens" in line else ""
    say(f"{name}: {f'{facts}; ' if facts else ''}{seconds:.1f} s{rate}")

def leftovers(path):
    """The files that interrupted attempts have left beside a result: temporary ones, blocks, raw samples."""
    return [*path.parent.glob(f".{path.stem}.*"), *path.parent.glob(f"{path.stem}.*.*")]

def to_delete(out, results, name):
    """A text that says what to delete so that the result, and all that was made after it, is made again."""
    later = map(Path, [*results][[*results].index(name):])  # entries are in the order in which work began
    paths = {p if p.parent == Path(name).parent else Path(*p.parts[:2]) for p in later}
    return f"to make it again delete {' '.join(sorted(str(out / p) for p in paths if (out / p).exists()))}"

# ---------------------------------------------------------------- names, log, and work in blocks
def name_of(o, path):
    """The name of a phase: the path of its result in the run folder. Seeds and log lines contain it."""
    return str(Path(path).relative_to(o.out).with_suffix(""))

def log_of(o, path):
    return open_log(Path(o.out) / "metrics.jsonl", name_of(o, path))

def open_log(path, phase):
    """Return log(**values), which adds a line to the JSONL file `path`. An earlier attempt's are removed."""
    if rank() == 0 and Path(path).exists():
        write_jsonl(path, [line for line in log_lines(path) if line["phase"] != phase])

    def log(**values):
        if rank() == 0:
            with open(path, "a") as file:
                file.write(json.dumps({"phase": phase, **values}) + "\n")
    return log

def log_lines(path):
    """The lines of a log as dicts, without a line that a kill or a full disk has cut off."""
    found = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        with suppress(ValueError, TypeError):
            found.append({"phase": "", **json.loads(line)})
    return found

def parts_of(out):
    """The folder that holds the blocks of a JSONL file until all are done."""
    return Path(out).with_name(f".{Path(out).name}.parts")

def in_blocks(rows, size, out, work, what):
    """Cut `rows` into blocks of `size`, and write the rows that work(block) yields to the JSONL file `out`.
    Processes take blocks in turn. Their number doesn't change the blocks, nor the shapes that models see. A
    finished block is kept for a restart. Without a terminal for a bar rank 0 says how far it is."""
    starts, tokens, began, told = range(0, len(rows), size), 0, time.time(), time.time()
    blocks = [parts_of(out) / f"{size}-{s}.jsonl" for s in starts]
    mine = [*zip(starts, blocks)][rank()::world()]
    for number, (s, block) in enumerate(tqdm(mine, what, disable=quiet(), leave=False), 1):
        if not block.exists():
            made = list(work(rows[s:s + size]))
            write_jsonl(block, made)
            tokens += sum(row.get("tokens", 0) for row in made)
        if time.time() > told + 30 and (number == len(mine) or not sys.stderr.isatty()):
            told = time.time()
            rate = f", about {world() * tokens / (told - began):.1f} tokens a second" * (tokens > 0)
            say(f"{what}: {number} of {len(mine)} blocks{rate}")
    with writing(out) as temporary:
        if rank() == 0:
            with open(temporary, "wb") as whole:
                whole.writelines(block.read_bytes() for block in blocks)
    remove(parts_of(out))
