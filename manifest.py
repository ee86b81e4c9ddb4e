"""A run's results in the order of their making, with their digests: `made` in run.json.

So that no phase builds on what is older than its own sources, or on a file that is not what was written.
"""
import hashlib
import json
import os
from pathlib import Path

from data import Problem
from parallel import from_rank0, rank
from run import note_of, read_note, remove, write_text


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
    rows = {"rows": path.read_bytes().count(b"\n")} if path.suffix == ".jsonl" else {}
    return {"bytes": size, **rows, "sha256": total.hexdigest()}
