"""Measure the speed and the memory of each part beside what one would use instead.

    python bench/bench.py sampler    # beside Hugging Face generate, in three ways
    python bench/bench.py dpo        # beside TRL's DPOTrainer
    python bench/bench.py profile    # where the time of DPO goes
    python bench/bench.py reward     # beside TRL's RewardTrainer; scoring beside plain transformers
    python bench/bench.py round      # where the time of the embedded task goes
    python bench/bench.py slots      # counts how busy the sampler's rows are over many blocks
    python bench/bench.py host       # what the CPU does in an E-step while accelerators wait
    python bench/bench.py traffic    # counts the bytes that two training processes exchange per step

The models have random weights, in fp32; they are made on first use in runs/bench. Every measurement runs with
one thread in a process of its own. The project and its peers take turns, `--repeats` times (once for the
large models), and the median is shown. Rates are per CPU second of the process, because other programs on the
machine disturb CPU time less than wall time. Peak memory is the largest resident set of the process while it
works, with all libraries. Training rates count the tokens without padding, and a prompt once for each of its
answers, on both sides.

The results are in bench/RESULTS.md. Memory is read from /proc, so this needs Linux.

Left out on purpose: GPUs (gpu.py), the speed of several processes, more settings of the other libraries.
"""
import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# name: hidden, layers, heads, kv_heads, intermediate, vocabulary
SHAPES = {"m10": (256, 6, 4, 2, 1024, 8192), "m60": (640, 10, 10, 5, 2048, 8192),
          "m135": (576, 30, 9, 3, 1536, 49152),   # SmolLM2-135M's, with tied embeddings
          "v128k": (256, 4, 4, 2, 1024, 128256),  # Llama-3's vocabulary
          "tiny": (64, 2, 4, 2, 128, 512)}        # for tests
FOLDER = ROOT / "runs" / "bench"
SPECIAL = ("<pad>", "<s>", "</s>")
NEW, ROWS, SAMPLES, BATCH = 128, 80, 5, 8
STEPS = {"m10": 6, "m135": 3, "v128k": 4, "tiny": 3}  # of the optimiser; the first, a warm-up, is not counted
TRL = "pip install trl==1.16.0 peft accelerate datasets"

# ---------------------------------------------------------------- models and data
def folder_of(name):
    """Return the folder of a Llama with random weights and a word-level tokenizer. Its logits have the
    standard deviation 2.5, as those of a language model."""
    folder = FOLDER / name
    if not (folder / "tokenizer.json").exists():
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[name]
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=name == "m135"))
        torch.nn.init.normal_(model.lm_head.weight, std=2.5 / hidden**0.5)  # its inputs have size 1
        model.save_pretrained(folder)
        vocabulary = [*SPECIAL, *map(word, range(len(SPECIAL), vocabulary))]
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        template = ("{{ bos_token }}{% for m in messages %} {{ m['content'] }}"
                    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}")
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                chat_template=template).save_pretrained(folder)
    return str(folder)

def word(i):
    return f"w{i}"

def text(rng, tokens, name):
    return " ".join(word(rng.randrange(3, SHAPES[name][5])) for _ in range(tokens))

def prompts_of(name, count):
    """Return `count` prompts, which are lists of 8 to 96 tokens."""
    rng, vocabulary = random.Random(1), SHAPES[name][5]
    return [[1] + [rng.randrange(3, vocabulary) for _ in range(rng.randint(7, 95))] for _ in range(count)]

def pairs_of(name, count, longer=1):
    """Return `count` pairs: prompts of 64 tokens, answers of 32 to 192 (times `longer`) with a stop token."""
    rng = random.Random(2)
    return [{"prompt": text(rng, 63, name), **{side: text(rng, longer * rng.randint(32, 192) - 1, name)
                                               for side in ("chosen", "rejected")}} for _ in range(count)]

def answers_of(name, count):
    """Return [(prompt, five answers)], as long as those of `pairs_of`."""
    rng = random.Random(3)
    return [(text(rng, 63, name), [text(rng, rng.randint(31, 191), name) for _ in range(SAMPLES)])
            for _ in range(count)]

# ---------------------------------------------------------------- measuring
class Measured:
    """A context manager: `cpu` is the CPU seconds of its block, `peak` the largest resident memory in MB."""
    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present value
        self.cpu = time.process_time()
        return self

    def __exit__(self, *_):
        self.cpu = time.process_time() - self.cpu
        self.peak = resident_mb("VmHWM")

def matmul_rate():
    """Return the operations per CPU second of the fastest of 20 products of two fp32 1024 x 1024 matrices."""
    import torch
    a, best = torch.randn(1024, 1024), float("inf")
    for _ in range(20):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best

def training_work(name, rows, with_head):
    """Return the floating-point operations of a forward and a backward pass over `rows`. A prompt's tokens
    count once for all of its answers, but attention counts for each chat as a whole."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[name]
    body = layers * hidden * (2 * hidden * (1 + kv_heads / heads) + 3 * intermediate)
    attention = sum((len(r.trunk) + len(b))**2 for r in rows for b in r.branches) * layers * hidden
    responses = sum(len(b) for r in rows for b in r.branches)
    head = with_head * responses * hidden * vocabulary
    return 3 * 2 * (body * sum(map(len, rows)) + attention + head)

class StepClock:
    """Takes the CPU seconds of every optimiser step, in `seconds`."""
    def __init__(self):
        self.seconds = []

    def start(self):
        self.at = time.process_time()

    def stop(self):
        self.seconds.append(time.process_time() - self.at)
        self.start()

    def rate(self, amount):
        """Return `amount`, which is of all steps, per CPU second. The first step, a warm-up, is not timed."""
        return amount / len(self.seconds) / statistics.mean(self.seconds[1:])

# ---------------------------------------------------------------- one measurement each: {rate, peak, …}
def sampler_project(name, prompts=64, new=NEW, stop=True):
    import numpy as np

    import sampler
    from common import models, parallel
    parallel.start()
    model = parallel.replicate(models.load_policy(folder_of(name)))
    keys = np.random.default_rng(0).integers(0, 2**63, (prompts, SAMPLES)).astype(np.uint64)
    with Measured() as measured:
        responses = sampler.generate(model, prompts_of(name, prompts), keys, temperature=0.8, top_p=0.95,
                                     stop_ids=stop_ids(name) if stop else [], max_new_tokens=new, rows=ROWS)
    return sampling_result([len(tokens) for row in responses for tokens in row], measured)

def stop_ids(name):
    """Return the tokens that end a response, one in 64: a response has about 55 tokens on average."""
    return list(range(3, SHAPES[name][5], 64))

def sampling_result(lengths, measured):
    return dict(rate=sum(lengths) / measured.cpu, unit="tok/s", peak=measured.peak,
                mean_length=statistics.mean(lengths))

def sampler_peer(name, kind, count=64):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=NEW,
                              pad_token_id=0, bos_token_id=1, eos_token_id=stop_ids(name),
                              num_return_sequences=SAMPLES)
    prompts, stops, lengths = prompts_of(name, count), torch.tensor(stop_ids(name)), []
    if kind == "sorted":
        prompts.sort(key=len)
    with Measured() as measured, torch.inference_mode():
        if kind == "continuous":
            from transformers import ContinuousBatchingConfig
            room = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=1024,
                                            max_requests_per_batch=ROWS)
            results = model.generate_batch(prompts, config, continuous_batching_config=room, warmup=False)
            lengths = [len(result.generated_tokens) for result in results.values()]
        else:
            for at in range(0, len(prompts), ROWS // SAMPLES):
                some = prompts[at:at + ROWS // SAMPLES]
                width = max(map(len, some))
                ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
                new = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]
                ended = torch.isin(new, stops).int().cumsum(1)
                lengths += ((ended == 0).sum(1) + 1).clamp(max=NEW).tolist()
    assert len(lengths) == count * SAMPLES
    return sampling_result(lengths, measured)

def training_project(kind, name, steps=None, longer=1):
    import dpo
    import reward
    from common import data, models, packing, parallel
    parallel.start()
    steps = steps or STEPS[name]
    folder, pairs, clock = folder_of(name), pairs_of(name, steps * BATCH, longer), StepClock()
    options = dict(batch=BATCH, micro_batch=2, max_length=2048)
    rows, _ = packing.pair_rows(data.load_tokenizer(folder), pairs, 2048, policy=kind == "dpo")

    def log(shown="", step=None, **_):
        clock.stop() if step else clock.start()  # the line without a step comes before the reference's pass

    with tempfile.TemporaryDirectory() as out, Measured() as measured:
        if kind == "dpo":
            *_, (_, _, model) = dpo.train(folder, pairs, beta=0.01, lr=5e-7, log=log, **options)
        else:
            model = reward.train(folder, pairs, lr=1e-5, fresh_head=True, log=log, **options)
        models.save(model, folder, Path(out))
    result = training_result(kind, clock, rows, measured)
    result["share"] = clock.rate(training_work(name, rows, kind == "dpo")) / matmul_rate()
    if kind == "dpo":  # the reference's log-probabilities were computed before the first step
        all_steps = steps * statistics.mean(clock.seconds[1:])
        result["with_reference"] = result["rate"] * all_steps / sum(clock.seconds)
    return result

def training_profile(name):
    """Return the CPU seconds of one step of DPO, with its reference, by kind of operation, and the operations
    per second of its matrix products and of one large product."""
    from torch.profiler import ProfilerActivity, profile

    import dpo
    from common import parallel
    parallel.start()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in dpo.train(folder_of(name), pairs_of(name, BATCH), beta=0.01, lr=5e-7, batch=BATCH,
                           micro_batch=2, max_length=2048, log=lambda *_, **__: None):
            pass
    seconds, work = dict.fromkeys(("matrix products", "attention", "everything else"), 0.0), 0
    for event in profiled.key_averages(group_by_input_shape=True):
        product, attention = event.key == "aten::mm", "scaled_dot_product" in event.key
        kind = "matrix products" if product else "attention" if attention else "everything else"
        seconds[kind] += event.self_cpu_time_total / 1e6
        if product:
            (rows, inner), (_, columns), *_ = event.input_shapes
            work += 2 * rows * inner * columns * event.count
    return dict(seconds=seconds, rate=work / seconds["matrix products"], best=matmul_rate())

def training_result(kind, clock, rows, measured):
    tokens = clock.rate(sum(len(r.trunk) + len(b) for r in rows for b in r.branches))
    rate, unit = (tokens, "tok/s") if kind == "dpo" else (clock.rate(len(rows)), "pairs/s")
    return dict(rate=rate, unit=unit, tokens=tokens, peak=measured.peak)

def classifier(folder):
    import torch
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    return model.eval()

def training_peer(kind, name, precompute=True, micro_batch=BATCH):
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    from common import packing
    folder, clock = folder_of(name), StepClock()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, _ = packing.pair_rows(tokenizer, pairs_of(name, STEPS[name] * BATCH), 2048)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop()

    with tempfile.TemporaryDirectory() as out, Measured() as measured:
        common = dict(output_dir=out, per_device_train_batch_size=micro_batch, max_steps=STEPS[name],
                      gradient_accumulation_steps=BATCH // micro_batch, report_to=[],
                      gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no",
                      max_length=None, logging_steps=1000, disable_tqdm=True)
        if kind == "dpo":
            class Trainer(DPOTrainer):
                def _prepare_dataset(self, dataset, *_):  # the dataset has tokens already
                    return dataset
            some = Dataset.from_list([dict(prompt_ids=[*row.trunk], chosen_ids=[*row.branches[0]],
                                           rejected_ids=[*row.branches[1]]) for row in rows])
            Trainer(model=folder, train_dataset=some, processing_class=tokenizer, callbacks=[Clock()],
                    args=DPOConfig(beta=0.01, learning_rate=5e-7, precompute_ref_log_probs=precompute,
                                   model_init_kwargs={"attn_implementation": "sdpa"}, **common)).train()
        else:
            model = classifier(folder)
            some = Dataset.from_list([dict(chosen_ids=[*row.trunk, *row.branches[0]],
                                           rejected_ids=[*row.trunk, *row.branches[1]]) for row in rows])
            RewardTrainer(model=model, args=RewardConfig(learning_rate=1e-5, **common), train_dataset=some,
                          processing_class=tokenizer, callbacks=[Clock()]).train()
    return training_result(kind, clock, rows, measured) | {
        "reference_in_steps": kind == "dpo" and not precompute}

def scoring_project(name):
    import reward
    from common import data, models, parallel
    parallel.start()
    folder = folder_of(name)
    model = reward.Rewards(parallel.replicate(models.load_reward(folder, fresh_head=True)))
    with Measured() as measured:
        reward.score_answers(model, data.load_tokenizer(folder), answers_of(name, 64), 4)  # 20 at a time
    return dict(rate=64 * SAMPLES / measured.cpu, unit="answers/s", peak=measured.peak)

def scoring_peer(name, kind):
    import torch

    from common import data
    model, tokenizer = classifier(folder_of(name)), data.load_tokenizer(folder_of(name))
    chats = [data.encode_chat(tokenizer, p, a) for p, answers in answers_of(name, 64) for a in answers]
    if kind == "sorted":
        chats.sort(key=len)
    with Measured() as measured, torch.inference_mode():
        for at in range(0, len(chats), 16):
            some = chats[at:at + 16]
            width = max(map(len, some))
            ids = torch.tensor([c + [0] * (width - len(c)) for c in some])
            mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in some])
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    return dict(rate=len(chats) / measured.cpu, unit="answers/s", peak=measured.peak)

def round_project(rounds, began):
    """Run mt.py; return its seconds of wall time by part, and the time of day at its end. What a part takes
    inside another is not counted in the outer one. began: the time of day when this process was started."""
    import dpo
    import mt
    import reward
    import sampler
    from common import models, run
    from evals import gold
    spent, open_parts = {}, []

    def timed(holder, function, part):
        inner = getattr(holder, function)

        def outer(*arguments, **options):
            open_parts.append([part, 0.0])
            start = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                total = time.perf_counter() - start
                _, inside = open_parts.pop()
                spent[part] = spent.get(part, 0.0) + total - inside
                if open_parts:
                    open_parts[-1][1] += total
        setattr(holder, function, outer)

    for holder, function, part in (
            (models, "_load", "loading"), (models.AutoConfig, "from_pretrained", "loading"),
            (sampler, "load_tokenizer", "loading"), (reward, "load_tokenizer", "loading"),
            (dpo, "load_tokenizer", "loading"), (models, "save", "saving"),
            (sampler, "generate", "sampling"), (reward, "score_answers", "scoring"),
            (mt, "train_policy", "training the policy"), (reward, "train", "training the reward model"),
            (mt, "report", "report"), (gold, "measure", "the rest"), (mt, "main", "the rest")):
        timed(holder, function, part)
    out = tempfile.mkdtemp()
    sys.argv = ["mt.py", "--rounds", str(rounds), "--out", f"{out}/run"]
    spent["start-up"] = time.time() - began
    try:
        run.launch(mt.main)
    finally:
        shutil.rmtree(out)
    return dict(spent=spent, ended=time.time())

def block_steps(rows, size, prompts=20_000):
    """Run the sampler's scheduler without a model, on blocks of `size` prompts with five responses each.
    Their lengths are drawn with a fixed seed, 386 tokens on average and at most 1,024. They are passed as
    keys, and a stand-in for sampler.draw ends each response by its key. Returns the steps of each block, the
    share of all rows that these steps kept busy, and the share of the rows that were still decoded."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    import sampler
    lengths = np.random.default_rng(0).gamma(2, 196, (prompts, SAMPLES)).clip(1, 1024).astype(np.uint64)
    nothing = torch.zeros(1)
    taken, decoded = [], []

    def step(slots, _, width):
        taken[-1] += 1
        decoded.append(len(slots.rows))
        return nothing.expand(len(slots.rows), 1)

    def draw(logits, keys, drawn, *_):
        tokens = (drawn + 1 == keys).long()
        return tokens, tokens.tolist()

    sampler.verify, sampler.Slots.step, sampler.draw = lambda model: None, step, draw
    sampler.cache_tokens = lambda model: 2**40
    sampler.prefill = lambda _, some: [([(nothing.expand(1, 1, 1),) * 2], nothing) for _ in some]
    for at in range(0, prompts, size):
        taken.append(0)
        some = lengths[at:at + size]
        responses = sampler.generate(
            SimpleNamespace(context=2048, device="cpu"), [[0]] * len(some), some, stop_ids=[1], temperature=1,
            top_p=1, max_new_tokens=1024, rows=rows)
        assert [[len(tokens) for tokens in row] for row in responses] == some.tolist()
    tokens = (lengths.sum() - lengths.size).item()
    return dict(steps=taken, busy=tokens / rows / sum(taken), of_decoded=tokens / sum(decoded))

def host_work(name, prompts):
    """Do what the CPU does in an E-step while accelerators wait, for `prompts` prompts with five responses of
    386 tokens on average. The processes of the group share the work. Returns {seconds: {part: CPU seconds of
    this process}, memory: MB that it took at most, without the pages of files}."""
    import filter
    import mt
    from common import data, models, packing, parallel, run
    parallel.start()
    rng, folder, seconds, peaks = random.Random(4), folder_of(name), {}, []
    texts = [text(rng, 1024, name).split() for _ in range(500)]
    path, other, tokenizer = FOLDER / "samples.jsonl", FOLDER / "pairs.jsonl", data.load_tokenizer(folder)

    def some(tokens):
        return " ".join(rng.choice(texts)[:tokens])

    def timed(part, work, *arguments):
        with Measured() as measured:
            result = work(*arguments)
        seconds[part] = measured.cpu
        peaks.append(measured.peak - resident_mb("RssFile"))
        return result

    def random_sample(prompt, index):
        tokens = min(1024, 1 + int(rng.gammavariate(2, 196)))
        return dict(prompt=prompt, index=index, response=some(tokens), tokens=tokens, finished=True,
                    policy=folder, score=rng.gauss(0, 1), rm=folder)

    def scored(row):
        return packing.whole_chats(tokenizer, row["prompt"], [row["response"]])

    questions = [some(130) + " " + word(3 + number % 8000) for number in range(prompts)]
    run.write_rows(path, (random_sample(prompt, i) for prompt in questions for i in range(SAMPLES)))
    before = resident_mb("RssAnon")
    rows = timed("the samples' rows, in each", data.read_jsonl, path)
    timed("the file's digest, in one", run.digest, path)
    timed("prompts to tokens", models.prompts_that_fit, folder, questions)
    timed("answers to tokens, in scoring", lambda: [
        len(scored(rows[i])) for i in range(parallel.rank(), len(rows), parallel.world())])
    timed("means, in each", mt.means, rows, "score", "tokens", "finished")
    pairs, _ = timed("pairs", filter.preference_pairs, rows)
    timed("pairs to a file, in one", run.write_rows, other, pairs)
    del pairs  # in a run, too, they are gone before the next phase reads the file
    pairs = timed("and back, in each", data.read_jsonl, other)
    timed("pairs to tokens", packing.pair_rows, tokenizer, pairs, 2048, True)
    run.remove(path, other)
    return dict(seconds=seconds, memory=max(peaks) - before)

def resident_mb(kind):
    """Return the resident memory of this process in MB. kind: "RssFile" for the pages of files, "RssAnon" for
    everything else, "VmHWM" for the peak of both."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024

def training_traffic(name, gradient, weights):
    """Count the bytes that each process receives in the second step of DPO. For two processes under torchrun.
    gradient, weights: whether each process keeps the whole of them between the micro-batches of a step, which
    training.kept_whole decides otherwise. Returns the bytes of each kind and of all parameters, and the norms
    of the weights after the step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import dpo
    from common import parallel, training
    parallel.start()
    received, share = {}, 1 - 1 / parallel.world()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            kind = {"_allgather_base_": "weights", "_reduce_scatter_base_": "gradients"}.get(function._opname)
            if kind:  # the whole is what an all-gather puts out, and what a reduce-scatter takes in
                whole = arguments[0] if kind == "weights" else arguments[1]
                received[kind] = received.get(kind, 0) + share * whole.nbytes
            return function(*arguments, **(options or {}))

    training.kept_whole = lambda *_: (gradient, weights)
    with Counting():
        for _, _, model in dpo.train(folder_of(name), pairs_of(name, 2 * BATCH), beta=0.1, lr=1e-3,
                                     batch=BATCH, micro_batch=1, max_length=2048, log=lambda *_, **__: None):
            weights, last, received = list(model.parameters()), received, {}
    return dict(last, parameters=4 * sum(weight.numel() for weight in weights),
                norms=[weight.full_tensor().norm().item() for weight in weights])

# ---------------------------------------------------------------- the tables
def measure(call, *launcher):
    """Run `call`, [a function of this file, its arguments…], in a process of its own; return its result."""
    command = [*(launcher or [sys.executable]), __file__, "--call", json.dumps(call)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"bench.py: {call} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])

def print_table(title, project, peers, repeats):
    """Measure the project and its peers, {label: call}, in turn, and print a table of the medians. Where a
    peer computes its reference in every step, the project's rate includes its reference, too."""
    calls = {"this project": project, **peers}
    results = {label: [] for label in calls}
    for _ in range(repeats):
        for label, call in calls.items():
            results[label].append(measure(call))
            print(f"{title}  {label}: {results[label][-1]}", file=sys.stderr, flush=True)
    medians = {label: {key: statistics.median_low(run[key] for run in runs) for key in runs[0]}
               for label, runs in results.items()}
    ours, others = medians["this project"], [medians[label] for label in peers]
    best = max(others, key=lambda m: m["rate"], default=None)
    print(f"\n| {title} | per CPU second | x faster | peak memory | x memory |\n|---|---|---|---|---|")
    for label, m in medians.items():
        mine = ours["with_reference" if m.get("reference_in_steps") else "rate"]
        more = (f"| {mine / m['rate']:.2f} | {m['peak']:,.0f} MB | {ours['peak'] / m['peak']:.2f} |"
                if m is not ours else f"| | {m['peak']:,.0f} MB | |")
        print(f"| {label}{' (fastest peer)' if m is best and len(others) > 1 else ''} "
              f"| {m['rate']:,.{0 if m['rate'] > 99 else 2}f} {m['unit']} {more}")
    if "share" in ours:
        print(f"\nThe project's training reaches {ours['share']:.0%} of the rate of a plain matrix product.")
    if "with_reference" in ours:
        print(f"With its reference, computed before the first step: {ours['with_reference']:,.0f} tok/s.")
    print(flush=True)

def print_growth(title, calls):
    """Print the CPU seconds per token of each of the calls, {label: call}, divided by those of the first."""
    results = {label: measure(call) for label, call in calls.items()}
    rates = [r.get("tokens", r["rate"]) for r in results.values()]
    print(f"| {title} | {' | '.join(results)} |\n|---|{'---|' * len(results)}")
    print("| CPU seconds per token | " + " | ".join(f"{rates[0] / rate:.2f}" for rate in rates) + " |")
    print("| peak memory | " + " | ".join(f"{r['peak']:,.0f} MB" for r in results.values()) + " |\n",
          flush=True)

def trl_installed():
    found = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
    if not found:
        print(f"TRL is not installed ({TRL}): the project is measured alone\n")
    return found

def sampling(repeats):
    for name, count in {"m10": 64, "m60": 64, "m135": 16}.items():
        folder_of(name)  # now, so that no measurement includes it
        print_table(f"sampling, {name}, {count} prompts x {SAMPLES}, {ROWS} rows",
                    ["sampler_project", name, count], {
            "generate": ["sampler_peer", name, "plain", count],
            "generate, prompts sorted by length": ["sampler_peer", name, "sorted", count],
            "generate_batch (continuous batching)": ["sampler_peer", name, "continuous", count]},
            repeats if name == "m10" else 1)
    print_growth("m10: prompts", {str(n): ["sampler_project", "m10", n] for n in (64, 128, 256)})
    print_growth("m10: tokens in every response", {str(n): ["sampler_project", "m10", 64, n, False]
                                                   for n in (128, 256, 512)})

def policy_training(repeats):
    peers = trl_installed()
    for name in ("m10", "m135", "v128k"):
        folder_of(name)
        calls = {"TRL, reference precomputed": ["training_peer", "dpo", name],
                 "TRL, reference in every step": ["training_peer", "dpo", name, False]}
        if name == "m10":
            calls["TRL, reference precomputed, micro-batches of 2"] = ["training_peer", "dpo", name, True, 2]
        print_table(f"DPO, {name}, batches of {BATCH} pairs", ["training_project", "dpo", name],
                calls if peers else {}, repeats if name == "m10" else 1)
    print_growth_of_training("dpo")

def profiles(_):
    print("| a step of DPO, with its reference | matrix products | attention | everything else "
          "| rate of its products | of one large product |\n|---|---|---|---|---|---|")
    for name in ("m10", "m135", "v128k"):
        folder_of(name)
        result = measure(["training_profile", name])
        shares = [f"{part / sum(result['seconds'].values()):.0%}" for part in result["seconds"].values()]
        rates = [f"{result[key] / 1e9:.0f} GFLOP/s" for key in ("rate", "best")]
        print(f"| {name} | {' | '.join(shares + rates)} |", flush=True)

def reward_models(repeats):
    folder_of("m10")
    peers = {"TRL": ["training_peer", "reward", "m10"], "TRL, micro-batches of 2":
             ["training_peer", "reward", "m10", True, 2]} if trl_installed() else {}
    print_table(f"reward model training, m10, batches of {BATCH} pairs",
                ["training_project", "reward", "m10"], peers, repeats)
    print_table(f"scoring {SAMPLES} answers to each of 64 prompts, m10", ["scoring_project", "m10"], {
        "transformers, padded": ["scoring_peer", "m10", "plain"],
        "transformers, padded, sorted by length": ["scoring_peer", "m10", "sorted"]}, repeats)
    print_growth_of_training("reward")

def print_growth_of_training(kind):
    print_growth("m10: pairs", {str(n * BATCH): ["training_project", kind, "m10", n] for n in (3, 6, 12)})
    print_growth("m10: tokens in an answer", {
        f"{32 * n} to {192 * n}": ["training_project", kind, "m10", 4, n] for n in (1, 2, 4)})

def slots(_):
    """Compare blocks that fill the rows four times with those of sampler.block_size."""
    import sampler
    print("| 20,000 prompts x 5, eight processes | prompts in a block | blocks | steps of a block, at most "
          "| rows busy | of those decoded | idle at the end |\n|---|---|---|---|---|---|---|")
    for rows in (64, 256):
        for size in (4 * rows // SAMPLES, sampler.block_size(20_000, rows / SAMPLES)):
            result = measure(["block_steps", rows, size])
            steps = result["steps"]
            dealt = [sum(steps[rank::8]) for rank in range(8)]
            print(f"| {rows} rows | {size:,} | {len(steps)} | {max(steps):,} | {result['busy']:.1%} "
                  f"| {result['of_decoded']:.1%} | {1 - statistics.mean(dealt) / max(dealt):.1%} |",
                  flush=True)

def host(_):
    folder_of("m10")
    one, eight = measure(["host_work", "m10", 6000]), measure_in_processes(8, ["host_work", "m10", 60_000])
    print("| the host, 60,000 prompts x 5: CPU seconds | one process | rank 0 of eight |\n|---|---|---|")
    for part, seconds in eight["seconds"].items():
        print(f"| {part} | {10 * one['seconds'][part]:.1f} | {seconds:.1f} |")
    print(f"| all | {10 * sum(one['seconds'].values()):.1f} | {sum(eight['seconds'].values()):.1f} |")
    print("\nThe single process had a tenth of the prompts, and its seconds are multiplied by ten. "
          f"Rank 0 of eight took up to {eight['memory'] / 1000:.2f} GB more than before.")

def measure_in_processes(count, call):
    """Run `call` in `count` processes under torchrun and return what it returns in rank 0."""
    return measure(call, sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={count}")

def traffic(_):
    folder_of("m10")
    print(f"| a step of {BATCH} pairs, m10, two processes, {BATCH // 2} micro-batches each "
          "| weights received | gradients received | all |\n|---|---|---|---|")
    for label, held in (("nothing kept", (False, False)), ("the gradient kept", (True, False)),
                        ("gradient and weights kept", (True, True))):
        result = measure_in_processes(2, ["training_traffic", "m10", *held])
        bytes_ = result["weights"], result["gradients"], result["weights"] + result["gradients"]
        print(f"| {label} | " + " | ".join(f"{b / 1e6:,.1f} MB" for b in bytes_) + " |", flush=True)

def whole_rounds(repeats):
    from common import toy
    toy.build(0)
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "1"]
    for rounds in (1, 3):
        runs = []
        for _ in range(repeats):
            began = time.time()
            result = measure(["round_project", rounds, began], *torchrun)
            result["spent"]["start-up"] += time.time() - result["ended"]
            runs.append((time.time() - began, result["spent"]))
        wall, spent = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
        print(f"\n| torchrun mt.py --rounds {rounds} | seconds | share |\n|---|---|---|")
        for part, seconds in sorted(spent.items(), key=lambda item: -item[1]):
            print(f"| {part} | {seconds:.1f} | {seconds / wall:.0%} |")
        overhead = sum(spent[part] for part in ("start-up", "loading", "saving"))
        print(f"| all | {wall:.1f} | |\n\nstart-up, loading and saving: {overhead / wall:.0%}", flush=True)

PARTS = {"sampler": sampling, "dpo": policy_training, "profile": profiles, "reward": reward_models,
         "round": whole_rounds, "slots": slots, "host": host, "traffic": traffic}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.repeats < 1:
        parser.error("--repeats must be at least 1")
    if o.call:
        function, *arguments = json.loads(o.call)
        import torch
        torch.set_num_threads(1)
        result = json.dumps(globals()[function](*arguments))
        if os.environ.get("RANK", "0") == "0":
            print(result, flush=True)
        os._exit(0)  # the threads of a process group can abort a regular exit
    elif not Path("/proc/self/clear_refs").exists():
        sys.exit("bench.py: memory is read from /proc, which this system lacks")
    elif o.part:
        os.chdir(ROOT)
        PARTS[o.part](o.repeats)
    else:
        parser.error(f"name a part: {', '.join(PARTS)}")
