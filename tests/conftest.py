"""What the tests share: tiny real models as Hugging Face folders, preference pairs, ways to run a script.

    pytest                          # all tests, in two processes
    pytest tests/test_mt.py -n 0    # one file, in this process
"""
import gc
import multiprocessing
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tolerances are for fp32, in which CPUs compute
os.environ["OMP_NUM_THREADS"] = "1"  # also in the scripts that tests start, so that all round alike
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import mt  # noqa: E402
from common import data, toy  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=96)
KINDS = {"llama": (LlamaConfig, SHAPE), "qwen2": (Qwen2Config, SHAPE), "mistral": (MistralConfig, SHAPE),
         "gpt2": (GPT2Config, dict(n_embd=32, n_layer=2, n_head=4, n_positions=96))}

FEW = ["--samples", 4, "--max_new_tokens", 10, "--max_length", 64, "--policy_batch", 8, "--policy_lr", 1e-3,
       "--rm_batch", 8, "--select_prompts", 6, "--tau", 0]  # options of a tiny run of mt.py

@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Exempt everything imported so far from garbage collection. models.py collects before it loads a model,
    and would search all of that each time."""
    gc.freeze()

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(kind, reward=False, seed=0, tokenizer=None, **config) -> folder of a small random model."""
    made = {}

    def make(kind="llama", reward=False, seed=0, tokenizer=None, **changes):
        key = (kind, reward, seed, id(tokenizer), str(changes))
        if key not in made:
            words = tokenizer or toy.tokenizer()
            config, shape = KINDS[kind]
            special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
            config = config(**{"vocab_size": len(words), "num_labels": 1 if reward else 2,
                               **special, **shape, **changes})
            torch.manual_seed(seed)
            auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
            model = auto.from_config(config)
            for weight in model.parameters():  # so large that tokens, positions and biases change the result
                weight.data.add_(torch.randn_like(weight), alpha=0.2)
            folder = tmp_path_factory.mktemp(f"{kind}-{'rm' if reward else 'policy'}")
            model.save_pretrained(folder)
            if not reward:
                GenerationConfig(**special | {"eos_token_id": [2, 7]}).save_pretrained(folder)
            words.save_pretrained(folder)
            made[key] = (str(folder), tokenizer)
        return made[key][0]
    return make

def with_weights(source, folder, change):
    """Copy a model's folder to `folder`, with change(weights) in the place of its weights."""
    shutil.copytree(source, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder

@pytest.fixture(scope="session")
def prompts():
    """30 different prompts of the embedded task."""
    return random.Random(0).sample(toy.all_prompts(), 30)

@pytest.fixture(scope="session")
def pairs():
    """97 preference pairs whose answers differ in length; every fourth rejected answer was cut off."""
    rng = random.Random(1)
    rows = []
    for number, prompt in enumerate(rng.sample(toy.all_prompts(), 97)):
        chosen, rejected = (toy.demonstration(prompt, rng) for _ in range(2))
        rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected, rejected_finished=number % 4 > 0))
    return rows

@pytest.fixture
def rng():
    return np.random.default_rng(0)

@pytest.fixture
def written(tmp_path):
    """written(name, rows) -> path of a JSONL file."""
    def write(name, rows):
        data.write_jsonl(tmp_path / name, rows)
        return tmp_path / name
    return write

@pytest.fixture
def call(monkeypatch):
    """call(module, "--flag", value, …): a script's main() in this process."""
    def run(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        return module.main()
    return run

@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script("dpo.py", "--flag", value, …, processes=2) -> the finished process: the real command line."""
    def run(name, *words, processes=1, cwd=None):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *map(str, words)]
        return subprocess.run(command, cwd=cwd or tmp_path_factory.mktemp("cwd"), text=True,
                              capture_output=True, timeout=300)
    return run

@pytest.fixture
def variant(tiny, written, prompts, tmp_path, monkeypatch):
    """variant("simpo", "--seed", 1, processes=2) -> the folder of a tiny run of a script in variants/.

    Its processes are forked from this one, which saves the time of all imports, and they make no report.
    What that leaves out is tested elsewhere: the real command in test_self_rewarding.py, torchrun in
    test_mt.py, the report in test_report.py."""
    monkeypatch.setattr(mt, "report", lambda out: None)
    path = written("prompts.jsonl", [{"prompt": p} for p in prompts])

    def run(name, *words, processes=1):
        out = tmp_path / f"{name}{processes}"
        words = ["--policy", tiny(), "--rm", tiny(reward=True), "--prompts", path, "--out", out, *FEW, *words]
        forked(f"variants.{name}", [*map(str, words)], processes)
        return out
    return run

def forked(module, words, processes, code=0):
    """Run a module as a script in a group of forked processes, as torchrun would, and assert that all of them
    exit with `code`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank):
        os.environ |= {name: str(value) for name, value in dict(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items()}
        sys.argv = [f"{module}.py", *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    fork = multiprocessing.get_context("fork")
    group = [fork.Process(target=start, args=[rank]) for rank in range(processes)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    codes = [process.exitcode for process in group]
    for process in group:
        process.kill()
    assert codes == [code] * processes

@pytest.fixture(scope="session")
def shared():
    """The folder of reference data, which is not part of the repository. Tests that need it are skipped
    where it is missing."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").exists():
        pytest.skip("../shared is not there")
    return folder

@pytest.fixture(scope="session")
def golden(shared):
    """The folder of small models and of what TRL and transformers compute with them."""
    return shared / "golden"
