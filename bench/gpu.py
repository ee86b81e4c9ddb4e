"""Check what the project computes on a GPU, and measure how fast and in how much memory it does so.

    python bench/gpu.py                       # all parts on one GPU, eight minutes at most
    python bench/gpu.py --parts 1B graphs     # some of them

correctness    bf16 beside fp32, the sampler beside plain forward passes, training by FSDP2, saving
0.1B, 1B, 8B   speed and memory of Llamas of these sizes; 8B only samples and scores
task           the embedded task by its default command: seconds, and gold of each round
graphs         a decoding step as it is, as a CUDA graph, and by torch.compile

The models have random weights and are made on the GPU. Every part runs in a process of its own with a limit
of seconds, so that an error or a full memory spoils no other part. Speed stands beside what the same GPU
reaches in a plain copy or a plain product of bf16 matrices. Memory is the peak of torch's tensors, beside the
estimate of evals/plan.py for the same shapes. The figures go to OUT/gpu.json, and what the parts print to
OUT/PART.log. The exit code is 1 if something failed. Without a GPU tiny models take the same way in fp32.

Left out on purpose: several GPUs, other libraries, models that have learnt something.
"""
import argparse
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402

import dpo  # noqa: E402
import reward  # noqa: E402
import sampler  # noqa: E402
from common import models, packing, parallel, probe, toy  # noqa: E402
from common.data import first_line, read_jsonl  # noqa: E402
from evals import plan  # noqa: E402
from evals.plan import GIB, POLICY, RM  # noqa: E402

CUDA, WIDTH = torch.cuda.is_available(), models.precision().itemsize  # bytes of a number in forward passes
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "intermediate_size", "vocab_size", "tie_word_embeddings")
SHAPES = {"0.1B": (768, 12, 12, 4, 2048, 32_000, False),
          "1B": (2048, 16, 32, 8, 8192, 128_256, True),     # Llama-3.2-1B's
          "8B": (4096, 32, 32, 8, 14_336, 128_256, False)}  # Llama-3-8B's
ROWS, PROMPT, NEW, ANSWER, BATCH, SAMPLES, SCORE_BATCH = (64, 256), 512, 72, 384, 16, 5, 8
if not CUDA:
    SHAPES = {name: (64, 2, 4, 2, 128, 512, shape[-1]) for name, shape in SHAPES.items()}
    ROWS, PROMPT, NEW, ANSWER, BATCH, SAMPLES, SCORE_BATCH = (2, 4), 24, 12, 16, 4, 2, 2

# ---------------------------------------------------------------- models and data
def make(name, kind=POLICY):
    """Return a model with random weights, made on this device and in its precision, with what
    models.load_policy would have given it. At 8 B this takes seconds, and a file would take minutes."""
    config = transformers.LlamaConfig(**dict(zip(FIELDS, SHAPES[name])), max_position_embeddings=2048,
                                      num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.initializer_range = 0.8 * config.hidden_size**-0.5  # so that attention matters at every width
    torch.manual_seed(0)
    with parallel.device():
        model = kind.from_config(config, dtype=models.precision(), attn_implementation="sdpa")
    if kind is POLICY:  # logits with the standard deviation of a language model's; their inputs have size 1
        torch.nn.init.normal_(model.lm_head.weight, std=2.5 * config.hidden_size**-0.5)
    model.set_attn_implementation("packed")
    model.context = config.max_position_embeddings
    return model.eval()

def tokenizer_of(name):
    """Return the embedded task's tokenizer with as many more words as the model's vocabulary has room for."""
    return toy.tokenizer([f"w{i}" for i in range(SHAPES[name][5] - len(toy.tokenizer()))])

def written_policy(name):
    """Write a model to the folder `policy`, and load it as the scripts do."""
    make(name).save_pretrained("policy")
    tokenizer_of(name).save_pretrained("policy")
    return parallel.replicate(models.load_policy("policy"))

def chats(count, answers):
    """Return [(prompt, [answer, …])]. With the tokens that the template adds, a prompt has PROMPT / 2 and an
    answer has ANSWER tokens."""
    rng = np.random.default_rng(0)

    def text(tokens):
        return " ".join(f"w{i}" for i in rng.integers(300, size=tokens))
    return [(text(PROMPT // 2 - 3), [text(ANSWER - 1) for _ in range(answers)]) for _ in range(count)]

def pairs_of(count):
    return [dict(prompt=prompt, chosen=one, rejected=other) for prompt, (one, other) in chats(count, 2)]

def token_lists(name, count, tokens):
    return np.random.default_rng(0).integers(5, SHAPES[name][5], (count, tokens)).tolist()

def sampled(policy, prompts, samples, new, **changes):
    """Sample answers of `new` tokens, in as many rows as there are answers. changes: to sampler.generate."""
    seeds = np.arange(len(prompts) * samples, dtype=np.uint64).reshape(len(prompts), samples)
    return sampler.generate(policy, prompts, seeds, **dict(
        stop_ids=[], temperature=0.8, top_p=0.95, max_new_tokens=new, rows=seeds.size) | changes)

# ---------------------------------------------------------------- measuring; each part has a folder to itself
def note(what, value, unit="", most=None, plan=None, **more):
    """Add a row of the table to rows.jsonl. most: raise an error if the value is larger. plan: {part: bytes},
    to stand beside the peak since the last `attempt`. more: `share` of what the GPU reaches, or anything."""
    if plan:
        more |= dict(plan=sum(plan.values()), peak=torch.cuda.max_memory_allocated() if CUDA else None)
    with open("rows.jsonl", "a") as file:
        file.write(json.dumps(dict(what=what, value=float(value), unit=unit, most=most, **more)) + "\n")
    if most is not None and not value <= most:
        raise AssertionError(f"{what}: {value:.3g} {unit}, more than {most:g}")

def attempt(work, *arguments):
    """Call work(*arguments), with as much memory free as possible. If it fails, write that down and go on."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        work(*arguments)
    except Exception as error:
        traceback.print_exc()
        words = [str(argument) for argument in arguments if isinstance(argument, str | int)]
        with open("failures", "a") as file:
            file.write(f"{work.__name__}({', '.join(words)}): {first_line(error)}\n")

def timed(work, times=5, warm_up=2):
    """Return the median of the seconds that work() takes until the GPU is done with it."""
    seconds = []
    for _ in range(warm_up + times):
        start = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[warm_up:]))

@functools.cache
def ceilings():
    """Return the bytes per second of a copy, read and written, and the FLOP per second of a product of
    matrices. They are random, because zeros would be faster."""
    side, size = (8192, 2**31) if CUDA else (256, 2**22)
    a, b = torch.randn(2, side, side, device=parallel.device(), dtype=models.precision())
    source, target = torch.ones(2, size, device=parallel.device(), dtype=torch.int8)
    bandwidth, flops = 2 * size / timed(lambda: target.copy_(source)), 2 * side**3 / timed(lambda: a @ b)
    note("a copy", bandwidth / 1e12, "TB/s")
    note("a product of matrices", flops / 1e12, "TFLOP/s")
    return bandwidth, flops

def share_of_product(size, rows, logits, seconds, passes=1):
    """Return how much of a plain product's rate a forward pass over `rows` (packing.Row) reaches, with
    `logits` rows of logits. Attention is causal, so it takes half of each chat's square. passes: 3 with a
    backward pass. size: plan.size_of."""
    squares = sum((len(row.trunk) + len(branch))**2 for row in rows for branch in row.branches)
    flops = 2 * (size.matrices - size.head) * sum(map(len, rows)) + 2 * size.head * logits
    return passes * (flops + 2 * size.layers * size.query * squares) / seconds / ceilings()[1]

def kernels(what, work):
    """Note how long the GPU is busy in work(), and in gpu.json the 15 kernels that take longest."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if CUDA else activity.CPU]) as profiler:
        seconds = timed(work, 1, 0)
    events = [(event.self_device_time_total / 1e3, event.count, event.key[:90])  # milliseconds
              for event in profiler.key_averages() if not event.is_user_annotation]
    note(f"{what}: the GPU is busy", sum(event[0] for event in events) / 1e3 / seconds,
         "of the time (with a profiler)", kernels=sorted(events, reverse=True)[:15])

# ---------------------------------------------------------------- correctness
def correctness():
    policy = written_policy("0.1B")
    for work in (probe_and_cache, greedy_tokens, draws, logps_and_rewards, training_and_saving):
        attempt(work, policy)

def probe_and_cache(policy):
    """Run the checks that every model passes at its first use, and note the largest difference in them."""
    seen, off = [], probe.off
    probe.off = lambda *arguments: seen.append(off(*arguments)) or seen[-1]
    sampler.verify(policy)
    probe.off = off
    note("packed attention and cache, off plain passes", max(seen), "of their norm", most=0.1)
    note("heads not taken for a plain matrix", not policy.plain_head, most=0)

@torch.no_grad()
def greedy_tokens(policy):
    """Compare the sampler's greedy tokens with a plain forward pass over prompt and answer.

    Kernels for other shapes round bf16 in other ways. So where two tokens are almost equally likely, the
    sampler may take the other one, and then the rest of the answer differs, too. Therefore equal tokens are
    not demanded, but that by the plain pass over the sampler's own answer each of its tokens is almost as
    likely as the likeliest. A wrong key in the cache would cost several nats."""
    prompts, losses = [prompt[:5 + 3 * i] for i, prompt in enumerate(token_lists("0.1B", 6, PROMPT))], []
    answers = sampled(policy, prompts, 2, NEW, temperature=0, rows=4)  # so rows are filled again
    for prompt, answer in ((p, answer) for p, both in zip(prompts, answers) for answer in both):
        logps = probe.plain_pass(policy, prompt + answer)[1][len(prompt) - 1:-1].float().log_softmax(-1)
        losses.append(logps.max(-1).values - logps[range(len(answer)), answer])
    losses = torch.cat(losses)
    note("greedy tokens that are not the plain pass's", (losses > 0).float().mean())
    note("greedy tokens, below the likeliest: mean", losses.mean(), "nats", most=0.02)
    note("greedy tokens, below the likeliest: largest", losses.max(), "nats", most=0.5)

def draws(policy):
    """Compare tokens drawn here with the CPU's, from the same logits, and two runs of the sampler. A sum that
    rounds differently can move a token's edge past the random number, but rarely does."""
    given = torch.randn(256, SHAPES["0.1B"][5]) * 2.5, torch.arange(256) * 2**50, torch.arange(256)
    here, cpu = (np.array(sampler.draw(*(x.to(place) for x in given), temperature=0.8, top_p=0.95)[1])
                 for place in (policy.device, "cpu"))
    note("drawn tokens that differ from the CPU's", np.mean(here != cpu), most=0.05)
    one, other = (np.array(sampled(policy, token_lists("0.1B", 4, 8), 2, NEW, rows=3)) for _ in range(2))
    note("sampled tokens that differ in a second run", np.mean(one != other), most=0)

@torch.no_grad()
def logps_and_rewards(policy):
    """Compare log-probabilities and rewards with those of the same weights in fp32."""
    rows, _ = packing.pair_rows(tokenizer_of("0.1B"), pairs_of(8), 2048, True)
    exact = parallel.replicate(models.load_policy("policy", training=True))
    ours, theirs = (dpo.pair_logps(dpo.ResponseLogps(model), rows, range(8)) for model in (policy, exact))
    note("log-probabilities, off fp32", (ours - theirs).abs().mean() / ANSWER, "nats a token", most=0.02)
    made = reward.Rewards(parallel.replicate(models.load_reward("policy", training=True, fresh_head=True)))
    models.save(made, "policy", "rm")
    exact, (ours, tokenizer) = parallel.replicate(models.load_reward("rm", training=True)), reward.load("rm")
    one, other = (np.array(reward.score_answers(model, tokenizer, chats(8, SAMPLES), SCORE_BATCH))
                  for model in (ours, reward.Rewards(exact)))
    size = exact.score.weight.norm().item()  # the head's inputs have size 1
    note("rewards, off fp32", np.abs(one - other).mean() / size, "of their size", most=0.05)

def training_and_saving(_):
    """Train two steps of Bradley-Terry and of DPO under FSDP2, and load what was saved. A loss that is not
    finite ends the training with an error."""
    pairs, lines = pairs_of(2 * BATCH), []
    settings = dict(lr=1e-4, batch=BATCH, micro_batch=2, max_length=2048, recompute=True,
                    log=lambda **line: lines.append(line))
    reward.train("rm", pairs, **settings)
    note("Bradley-Terry's second loss", lines.pop()["loss"], "nats")
    *_, (_, _, trained) = dpo.train("policy", pairs, beta=0.1, **settings)
    assert isinstance(trained, FSDPModule)
    models.save(trained, "policy", "trained")
    old, new = models.weights_of("policy"), models.weights_of("trained")
    same = sum((old[n] == w).sum().item() for n, w in new.items()) / sum(w.numel() for w in new.values())
    rows, _ = packing.pair_rows(tokenizer_of("0.1B"), pairs[:8], 2048, True)
    loaded = dpo.ResponseLogps(parallel.replicate(models.load_policy("trained")))
    with torch.no_grad():
        off = (dpo.pair_logps(loaded, rows, range(8)) - dpo.pair_logps(trained, rows, range(8))).abs()
    note("DPO's second loss", lines[-1]["loss"], "nats")
    note("DPO's first loss, off ln 2", abs(lines[-2]["loss"] - np.log(2)), "nats", most=1e-3)
    note("weights that two steps did not change", same, most=0.9)
    note("log-probabilities when loaded again, off", off.mean() / ANSWER, "nats a token", most=1e-3)

# ---------------------------------------------------------------- speed and memory
def speed(name):
    start, saved = time.perf_counter(), name != "8B"
    policy = written_policy(name) if saved else make(name)
    note("making the policy" + ", saving and loading it" * saved, time.perf_counter() - start, "s")
    ceilings()
    for rows, prompt in ((ROWS[0], PROMPT), (ROWS[1], PROMPT), (ROWS[0], PROMPT - 1)):
        attempt(decoding, name, rows, prompt, policy)
    attempt(prefilling, name, policy)
    size = plan.size_of(policy.config, POLICY, WIDTH)
    del policy
    attempt(scoring, name, saved)
    for recompute, micro, profiled in ((False, 2, 0), (True, 8, 0), (True, 2, 1)) if saved else ():
        attempt(training, name, recompute, micro, profiled, size)
    attempt(kernels, f"decoding, {ROWS[0]} rows", functools.partial(  # one prompt, so decoding takes most
        sampled, make(name), [[5] * PROMPT], ROWS[0], NEW // 3))

def decoding(name, rows, prompt, policy):
    """Time the sampler's decoding steps after the first eight, with all that it does between them. A step
    reads the weights and the cache once. An odd capacity of the cache leaves keys at odd addresses."""
    begun, step, size = [], sampler.Slots.step, plan.size_of(policy.config, POLICY, WIDTH)
    sampler.verify(policy)
    sampler.Slots.step = lambda *arguments: begun.append(time.perf_counter()) or step(*arguments)
    sampled(policy, token_lists(name, rows, prompt), 1, NEW)
    sampler.Slots.step = step
    seconds = (begun[-1] - begun[8]) / (len(begun) - 9)
    read = WIDTH * size.matrices + rows * (prompt + NEW / 2) * size.token
    note(f"decoding, {rows} rows, prompts of {prompt} tokens", rows / seconds,
         f"tok/s, {1000 * seconds:.3g} ms a step", share=read / seconds / ceilings()[0],
         plan=plan.sampling(size, rows, prompt, NEW))

@torch.no_grad()
def prefilling(name, policy):
    prompts, size = token_lists(name, sampler.PREFILL, PROMPT), plan.size_of(policy.config, POLICY, WIDTH)
    seconds = timed(lambda: sampler.prefill(policy, prompts))
    rows = [packing.row_of(prompt, [[]]) for prompt in prompts]
    note(f"prefill of {len(prompts)} prompts", len(prompts) * PROMPT / seconds, "tok/s",
         share=share_of_product(size, rows, len(prompts), seconds))

def scoring(name, saved):
    model = models.load_reward("policy", fresh_head=True) if saved else make(name, RM)
    scorer, tokenizer = reward.Rewards(parallel.replicate(model)), tokenizer_of(name)
    groups, size = chats(2 * SCORE_BATCH, SAMPLES), plan.size_of(model.config, RM, WIDTH)
    rows = [packing.whole_chats(tokenizer, *group) for group in groups]
    seconds = timed(lambda: reward.score_answers(scorer, tokenizer, groups, SCORE_BATCH), 1, 1)
    note(f"scoring {SCORE_BATCH} x {SAMPLES} answers at a time", sum(map(len, rows)) / seconds, "tok/s",
         share=share_of_product(size, rows, 0, seconds),
         plan=plan.scoring(size, SCORE_BATCH, PROMPT // 2, ANSWER, SAMPLES))
    host = timed(lambda: packing.collate([packing.whole_chats(tokenizer, *group) for group in groups]), 1)
    note("scoring: making the batches on the CPU", host / seconds, "of the time")

def training(name, recompute, micro, profiled, size):
    """Time four steps of DPO, after a first one. The share counts the FLOPs of one forward and one backward
    pass, so those of recomputing lower it. profiled: add `kernels` of a sixth step. A profiler may slow down
    what comes after it, so this is for the last training."""
    ended, pairs = [], pairs_of(6 * BATCH)
    steps = dpo.train("policy", pairs, beta=0.1, lr=1e-6, batch=BATCH, micro_batch=micro, max_length=2048,
                      recompute=recompute, log=lambda **_: ended.append(time.perf_counter()))
    for _ in range(5):
        next(steps)
    seconds = (ended[5] - ended[1]) / 4  # ended[0] is the line of the log before the first step
    rows, _ = packing.pair_rows(tokenizer_of(name), pairs[:BATCH], 2048, True)
    what = f"DPO, {micro} pairs at a time" + ", recompute" * recompute
    note(what, sum(map(len, rows)) / seconds, "tok/s",
         share=share_of_product(size, rows, 2 * BATCH * ANSWER, seconds, 3),
         plan=plan.train_step(size, 1, micro, PROMPT // 2, ANSWER, recompute, parallel.memory()))
    if profiled:
        attempt(kernels, what, lambda: next(steps))

# ---------------------------------------------------------------- the embedded task
SMALL_TASK = f'''"""The embedded task with so few prompts that it takes seconds on a CPU."""
import functools, sys
sys.path.insert(0, {str(ROOT)!r})
import mt
from common import run, toy
toy.LOOP_PROMPTS, toy.TEST_PROMPTS, toy.LABELS, toy.DEMONSTRATIONS = 30, 10, 20, 320
toy.build, mt.report = functools.partial(toy.build, script=__file__), lambda out: None
run.launch(mt.main if "--rounds" in sys.argv else toy.main)
'''

def task():
    Path("small.py").write_text(SMALL_TASK)
    script, words = (ROOT / "mt.py", "--rounds 3") if CUDA else ("small.py", "--rounds 1 --select_prompts 6")
    start = time.perf_counter()
    subprocess.run([sys.executable, script, *words.split(), "--out", "run"], check=True)
    note(f"mt.py {words}", time.perf_counter() - start, "s", phases=read_jsonl("run/timings.jsonl"))
    for line in read_jsonl("run/gold.jsonl"):
        note(f"gold, {line['policy']}", line["gold"], f"± {line['gold_se']:.3f}")

# ---------------------------------------------------------------- CUDA graphs
def graphs():
    for name in ("1B", "8B", "0.1B") if CUDA else ():
        for rows in ROWS:
            attempt(decoding_step, name, rows, captured)
    for rows in ROWS:  # last, since compiling takes long
        attempt(decoding_step, "1B", rows, compiled)

@torch.no_grad()
def decoding_step(name, rows, faster):
    """Time a step of the model with a cache of PROMPT tokens, all of which it reads: as the sampler calls it,
    and `captured` or `compiled`."""
    policy, slots = make(name), sampler.Slots(rows, PROMPT, parallel.device())
    slots.fill(range(rows), [sampler.prefill(policy, token_lists(name, 1, PROMPT // 2))[0][0]] * rows)
    slots.token[:] = torch.arange(rows)
    at, begin, label = slots.at, slots.at.clone(), f"{name}, {rows} rows: a decoding step"

    def step():
        logits = slots.step(policy, PROMPT)
        at.copy_(slots.at)  # a graph reads and writes the same memory each time
        slots.at = at
        return logits

    expected = step().clone()
    note(label, 1000 * timed(step, 20, 5), "ms")
    fast = faster(step, [slots.rows, slots.token, at, *sum(slots.layers, ())])
    for _ in range(3):  # the first calls of a compiled step compile it and capture its graph
        at.copy_(begin)
        off = probe.off(fast(), expected)
    note(f"{label}, {faster.__name__}", 1000 * timed(fast, 20, 5), "ms",
         skipped=torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
    note(f"{label}, {faster.__name__}: logits, off", off, "of their norm", most=0.05)

def captured(step, _):
    """Return a function that replays a CUDA graph of step() and returns its result."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in a first call, which can't be captured
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # nccl has a thread, too
        logits = step()
    return lambda: graph.replay() or logits

def compiled(step, buffers):
    """Return step() compiled as one graph. buffers: tensors that it reads and writes in place. Dynamo does
    not trace functools.cache, so each layer computes the mask, and the compiler joins what is equal."""
    sampler.cache = lambda function: function
    for tensor in buffers:
        torch._dynamo.mark_static_address(tensor)  # else their mutation would forbid a CUDA graph
    how = dict(mode="reduce-overhead") if CUDA else dict(backend="eager")
    fast = torch.compile(step, fullgraph=True, dynamic=False, **how)
    return lambda: torch.compiler.cudagraph_mark_step_begin() or fast()

# ---------------------------------------------------------------- parts, each in a process of its own
TOTAL = 460  # seconds for all parts together; the numbers below are the most that each may take
PARTS = {"correctness": (90, correctness), "0.1B": (75, speed, "0.1B"), "1B": (110, speed, "1B"),
         "8B": (75, speed, "8B"), "task": (210, task), "graphs": (150, graphs)}

def work_on(part):
    """Do a part in this process and in the current folder, and end the process."""
    parallel.start()
    if not dist.is_initialized():  # a CPU takes the way through FSDP, too
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    attempt(*PARTS[part][1:])
    sys.stdout.flush()
    os._exit(0)  # the threads of a process group can abort a regular exit

def run_part(part, limit, log):
    """Run a part in a process of its own for `limit` seconds at most. Return its rows and failures."""
    start, failed, command = time.time(), [], [sys.executable, ROOT / "bench" / "gpu.py", "--work_on", part]
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, start_new_session=True,
                                   env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"})
        try:
            if code := process.wait(limit):
                failed.append(f"exit code {code}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            failed.append(f"stopped after {limit:.0f} s, exit code {process.wait()}")
        rows, failures = Path(folder, "rows.jsonl"), Path(folder, "failures")
        failed += failures.read_text().splitlines() if failures.exists() else []
        return dict(ok=not failed, seconds=time.time() - start, failed=failed,
                    rows=read_jsonl(rows) if rows.exists() else [])

def line_of(row):
    """Return a row of rows.jsonl as a line of the table."""
    value = f"{row['value']:,.0f}" if abs(row["value"]) >= 100 else f"{row['value']:.3g}"
    most = "" if row["most"] is None else f" (at most {row['most']:g})"
    share = f"{row['share']:.1%}" if "share" in row else ""
    peak, plan = (f"{row[key] / GIB:.2f}" if row.get(key) else "" for key in ("peak", "plan"))
    return f"| {row['what']} | {value} {row['unit']}{most} | {share} | {peak} | {plan} |"

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[
        part for part in PARTS if CUDA or part != "0.1B"])  # which would be the same as 1B
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of gpu.json and logs")
    parser.add_argument("--work_on", choices=PARTS, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.work_on:
        work_on(o.work_on)
    query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda,
                    transformers=transformers.__version__, gpu=CUDA and subprocess.getoutput(query))
    print(*(f"{name}: {version}" for name, version in versions.items()), "",
          "| what | value | share of a copy or product | peak GiB | plan GiB |", "|---|---|---|---|---|",
          sep="\n", flush=True)
    parts, start = {}, time.time()
    o.out.mkdir(parents=True, exist_ok=True)
    for part in o.parts:
        limit = max(1, min(PARTS[part][0], TOTAL - (time.time() - start)))
        done = parts[part] = run_part(part, limit, o.out / f"{part}.log")
        print(f"| **{part}: {'ok' if done['ok'] else 'FAILED'}, {done['seconds']:.0f} s** | | | | |",
              *map(line_of, done["rows"]), sep="\n", flush=True)
        (o.out / "gpu.json").write_text(json.dumps(dict(versions=versions, parts=parts), indent=1))
    failed = [f"{part} failed: {line}" for part, done in parts.items() for line in done["failed"]]
    print("", *failed or ["every part is ok"], sep="\n")
    sys.exit(bool(failed))

if __name__ == "__main__":
    main()
