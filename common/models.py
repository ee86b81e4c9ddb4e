"""Checkpoints in and out: folders and hub ids, loading and saving. Safetensors only, and no remote code."""
import gc
import math
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion

from common import packing  # noqa: F401  (its attention is the one that models get)
from common.data import encode_chat, first_line, load_tokenizer
from common.parallel import Problem, barrier, device, memory, rank, say, share_work, world

def local_folder(name):
    """The folder of a model: `name` itself, or the snapshot of a hub id."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise Problem(f"{name}: no such folder")
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    try:
        if rank() == 0:
            snapshot_download(name, allow_patterns=patterns)
        barrier()
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:
        raise Problem(f"{name}: no such folder, and not to be had from the hub "
                      f"({first_line(error)})") from None

# ---------------------------------------------------------------- what a folder's config says
def config_of(folder):
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise Problem(f"{folder}: not a model folder ({first_line(error)})") from None

def check_policy(folder):
    """Refuse a reward model, by its config; returns the config."""
    config = config_of(folder)
    if (config.architectures or ["?"])[0].endswith("ForSequenceClassification"):
        raise Problem(f"{folder}: a {config.architectures[0]}, which is a reward model and no policy")
    return config

def check_reward(folder, fresh_head=False):
    """Refuse, by its config, a head of several labels, or none unless `fresh_head`; returns the config."""
    config = config_of(folder)
    kind = (config.architectures or ["?"])[0]
    if not kind.endswith("ForSequenceClassification"):
        if not fresh_head:
            raise Problem(f"{folder}: {kind} has no reward head; "
                          f"train one: python reward.py --model {folder} --pairs …")
        say(f"{folder} is a {kind}: training starts with a fresh reward head")
    elif config.num_labels != 1:
        raise Problem(f"{folder}: its head has {config.num_labels} labels; a reward model has one")
    return config

def context_of(folder, config=None):
    """The longest sequence in tokens: all positions, or those up to which a chat is read alike whatever its
    length (longrope changes its frequencies there) and attention is not cut into chunks."""
    config = (config or config_of(folder)).get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise Problem(f"{folder}: {config.model_type} models are not supported (no max_position_embeddings)")
    rope = getattr(config, "rope_parameters", None) or {}
    # These are the parameters of all layers, or hold those of each kind of layer.
    ends = [kind["original_max_position_embeddings"] for kind in (rope, *rope.values())
            if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    chunk = getattr(config, "attention_chunk_size", None) or math.inf
    return min(config.max_position_embeddings, chunk, *ends)

def prompts_that_fit(folder, prompts, answer=1):
    """(those prompts that leave room for an answer of so many tokens in a model's context, the numbers of
    their tokens). How many are left out is said; if all are, that is a Problem."""
    tokenizer, context = load_tokenizer(folder), context_of(folder)
    lengths = share_work(len(prompts), lambda i: len(encode_chat(tokenizer, prompts[i]).ids), "tokens")
    fit = [(prompt, length) for prompt, length in zip(prompts, lengths) if length + answer <= context]
    if not fit:
        raise Problem(f"no prompt fits into the context of {context} tokens of {folder} with an answer of "
                      f"{answer}; the shortest has {min(lengths)}")
    if len(fit) < len(prompts):
        say(f"{len(prompts) - len(fit)} of {len(prompts)} prompts are too long for {folder} and left out")
    return map(list, zip(*fit))

def bytes_of(folder):
    """The size of a saved model's weights."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))

def disk_needed(o, policy, rm, steps):
    """Bytes that a run's models take at most. o: mt.Options; policy, rm: bytes of one; steps: of a DPO."""
    checkpoints = steps // o.save_every + 1 if o.select else 1
    return o.rounds * (2 * policy + o.update_rm * rm) + checkpoints * policy

def check_fits(folder, training=False):
    """Refuse a model that is too large for the memory. Sampling and scoring have the whole of it in every
    process; in training the processes share 16 bytes a parameter (training.kept_whole)."""
    parameters = bytes_of(folder) // (config_of(folder).dtype or torch.float32).itemsize
    need = parameters * (16 / world() if training else 2 if device().type == "cuda" else 4)
    if need > memory():
        what = "training it" if training else "a whole copy, which sampling and scoring need,"
        raise Problem(f"{folder}: {what} takes {need / 1e9:.3g} GB in each process, which has "
                      f"{memory() / 1e9:.3g}; batch sizes can't help")

# ---------------------------------------------------------------- loading
def load_policy(folder, training=False):
    """A causal LM, in every process; only rank 0's has weights until `replicate` or `shard`."""
    return _load(AutoModelForCausalLM, folder, check_policy(folder), training)

def load_reward(folder, training=False, fresh_head=False, seed=0):
    """A sequence classifier with one logit. fresh_head: a causal LM is taken too and gets a new head."""
    config = check_reward(folder, fresh_head)
    config.num_labels = 1
    torch.manual_seed(seed)  # the fresh head's
    model = _load(AutoModelForSequenceClassification, folder, config, training)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or model.score.bias is not None:
        raise Problem(f"{folder}: {type(model).__name__} has no linear head `score`, which is not supported")
    return model

def _load(kind, folder, config, training):
    check_fits(folder, training)
    # A sharded model holds references to itself, so only a collection frees it, which takes 0.2 s. On CPUs at
    # most one such model is left, until the next training.
    if torch.cuda.is_available() or training and dist.is_initialized():
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    stored = config.dtype or torch.float32
    dtype = torch.float32 if training or device().type == "cpu" else torch.bfloat16
    try:
        if rank() == 0:
            model, info = kind.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa",
                                               use_safetensors=True, output_loading_info=True)
            headless = not (config.architectures or [""])[0].endswith("ForSequenceClassification")
            missing = sorted(n for n in info["missing_keys"] if not (headless and n.startswith("score.")))
            if missing:
                raise ValueError(f"weights are missing: {', '.join(missing[:3])}")
        else:
            with torch.device("meta"):
                model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        raise Problem(f"{folder}: can't be loaded as a model ({first_line(error)})") from None
    model.set_attn_implementation("packed")  # not at once: a model without SDPA would not be noticed
    model.stored_dtype, model.context = stored, context_of(folder, config)
    return model.eval()  # and so it stays: dropout would make a policy differ from itself as reference

# ---------------------------------------------------------------- saving
def save(root, source, folder):
    """A folder that from_pretrained and vLLM load; tokenizer and template come from the folder `source`.
    Weights are rounded to its precision. The config comes last: a folder with one is whole."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(root, options=options) if dist.is_initialized() else root.state_dict()
    if rank() == 0:
        try:
            _write(root.model, weights, source, Path(folder))
        except Exception as error:  # tokenizers has no exceptions of its own for a full disk
            raise Problem(f"{folder}: not saved: {first_line(error)}") from None
    barrier()

def _write(model, weights, source, folder):
    weights = {name.removeprefix("model."): w for name, w in weights.items()}
    damaged = [name for name, w in weights.items() if not w.isfinite().all()]
    if damaged:
        raise Problem(f"NaN or infinite numbers in {damaged[0]}; try a smaller learning rate")
    if model.config.tie_word_embeddings:
        weights = {name: w for name, w in weights.items() if name not in (model._tied_weights_keys or {})}
    weights = {name: w.to(model.stored_dtype, copy=True)
               for name, w in revert_weight_conversion(model, weights).items()}  # to the names of the hub
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    load_tokenizer(source).save_pretrained(folder)
    generation = Path(source) / "generation_config.json"
    if generation.exists() and model.can_generate():
        shutil.copy(generation, folder)
    model.config.architectures = [type(model).__name__]
    config = model.config.to_dict() | {"dtype": str(model.stored_dtype).removeprefix("torch.")}
    type(model.config).from_dict(config).save_pretrained(folder)
