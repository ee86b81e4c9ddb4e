"""Kill runs of mt.py, go on with the same command, and compare every file with those of an undisturbed run.

    python bench/kills.py --times 100                   # one process
    python bench/kills.py --times 100 --processes 2     # one of two processes is killed

A kill is a SIGKILL. It comes right before a random operation on a file of the run folder (opening for
writing, renaming, removing, making a folder or link), or at a random time. Most runs are killed again while
they go on. In the end every file must be the same as in the undisturbed run, byte by byte, and no other file
may be there. The models are tiny and random. Processes are forked from one that has imported everything, so
that a restart takes no time.
"""
import argparse
import gc
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification  # noqa: E402

import mt  # noqa: E402
from common import run, toy  # noqa: E402
from common.data import write_jsonl  # noqa: E402
from evals import plots  # noqa: E402

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "shutil.rmtree")

def make_inputs(folder):
    """Make tiny models and prompts in `folder`; return the command line of mt.py for them."""
    words = toy.tokenizer()
    for name, kind in (("policy", LlamaForCausalLM), ("rm", LlamaForSequenceClassification)):
        torch.manual_seed(0)
        model = kind(LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_labels=1,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
            bos_token_id=1, eos_token_id=2))
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    prompts = random.Random(0).sample(toy.all_prompts(), 25)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    flags = dict(policy=folder / "policy", rm=folder / "rm", prompts=folder / "prompts.jsonl", out="run",
                 samples=3, max_new_tokens=8, max_length=48, policy_batch=3, policy_lr=1e-3, rm_batch=4,
                 rm_lr=1e-3, tau=0, save_every=1, select_prompts=4, sample_batch=2)
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]

def die_before(operation):
    """Have this process kill itself right before its `operation`-th operation on a file of the run, counted
    from now on."""
    left = [operation]

    def hook(event, arguments):
        writes = event != "open" or isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if event in EVENTS and writes and "run/" in f"{arguments[0]}/":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def start(words, folder, rank, processes, port, operation):
    """Fork one process of a run, which dies before its `operation`-th operation on a file if this is not 0.
    Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ |= {name: str(value) for name, value in dict(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items()}
        os.chdir(folder)
        with open("log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["mt.py", *words]
        if operation:
            die_before(operation)
        run.launch(mt.main)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)

def attempt(words, folder, processes, rng=None):
    """Run the command; with an `rng`, kill it at a random place. Returns whether it ended regularly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    victim, by_time = (rng.randrange(processes), rng.random() < 0.3) if rng else (None, False)
    operation = rng.randint(1, 40) if rng and not by_time else 0
    pids = [start(words, folder, r, processes, port, operation * (r == victim)) for r in range(processes)]
    if by_time:
        time.sleep(rng.uniform(0.05, 1.5))
        os.kill(pids[victim], signal.SIGKILL)  # its pid stays valid until os.wait, even if it has ended
    codes, alive = [], set(pids)
    while alive:
        pid, status = os.wait()
        alive.remove(pid)
        codes.append(status)
        if status:  # one has failed: end the others, as torchrun does
            for other in alive:
                os.kill(other, signal.SIGKILL)
    if any(codes) and not any(os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL for code in codes):
        sys.exit(f"kills.py: the run failed without a kill:\n{(folder / 'log').read_text()[-3000:]}")
    return not any(codes)

def files(folder):
    """Return {name: bytes} of a run folder's files, without those that differ from run to run: run.json, the
    times and the report, which shows the times."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and not p.is_symlink() and p.name not in (
                "run.json", "timings.jsonl", "report.png", "report.html")}

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="how many kills")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # loading a model collects garbage; what was imported is none and need not be searched
    plots.find_spec = lambda name: None  # matplotlib counts as missing, because pictures take seconds
    rng, kills, runs = random.Random(o.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        words = make_inputs(scratch / "inputs")
        (scratch / "undisturbed").mkdir()
        assert attempt(words, scratch / "undisturbed", o.processes)
        expected = files(scratch / "undisturbed" / "run")
        while kills < o.times:
            folder = scratch / f"disturbed{runs}"
            folder.mkdir()
            runs, done = runs + 1, False
            while not done:
                again = kills < o.times and rng.random() < 0.7
                done = attempt(words, folder, o.processes, rng if again else None)
                kills += not done
            found = files(folder / "run")
            for name in sorted({*expected, *found}):
                if expected.get(name) != found.get(name):
                    sys.exit(f"kills.py: after {kills} kills, run {runs}: {name} differs")
            print(f"{kills} kills, {runs} runs: all files are as in the undisturbed run", flush=True)
    print(f"{kills} kills in {runs} runs with {o.processes} process{'es' * (o.processes > 1)}: "
          f"{len(expected)} files, not one byte different")

if __name__ == "__main__":
    main()
