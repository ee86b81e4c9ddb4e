"""Model folders: find them, check them, load them, save them. Safetensors only, and no remote code."""
import gc
import math
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from common import packing  # noqa: F401  (it registers the attention that models get)
from common.data import encode_chat, load_tokenizer, read_json, refusing
from common.parallel import Problem, barrier, device, memory, on_rank0, rank, say, share_work, world

FEW = 0.005  # a warning is given if fewer weights change; 160 of the paper's steps change 0.0125

def local_folder(name):
    """The folder of a model: `name` if it is a folder, else the downloaded snapshot of the hub id `name`."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise Problem(f"{name}: no such folder")
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    with refusing(f"{name}: no such folder, and the hub does not give it"):
        return on_rank0(lambda: snapshot_download(name, allow_patterns=patterns))

# ---------------------------------------------------------------- checks
def config_of(folder):
    with refusing(f"{folder}: not a model folder"):
        return AutoConfig.from_pretrained(folder)

def files_of(folder):
    """The files of weights that transformers reads. Others may lie beside them."""
    whole, index = (Path(folder) / name for name in ("model.safetensors", "model.safetensors.index.json"))
    if whole.exists() or not index.exists():
        return [whole] * whole.exists()
    return [whole.with_name(name) for name in sorted({*read_json(index)["weight_map"].values()})]

def shapes_of(folder):
    """{name: shape} of the weights in a model folder, from the headers of its files."""
    shapes = {}
    for file in files_of(folder):
        with refusing(f"{file}: not a file of weights"), safe_open(file, "pt") as opened:
            shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    return shapes

def weights_of(folder):
    """{name: tensor} of all weights in a model folder."""
    return {name: w for file in files_of(folder) for name, w in load_file(file).items()}

def check_policy(folder):
    """Return the folder's config. Raise a Problem if its model is a reward model."""
    config = config_of(folder)
    kind = (config.architectures or ["?"])[0]
    if kind.endswith("ForSequenceClassification") or "score.weight" in shapes_of(folder):
        raise Problem(f"{folder}: {kind} with a reward head is a reward model, but a policy is needed")
    return config

def check_reward(folder, fresh_head=False):
    """Return the folder's config, with one label. A model with a `score.weight` of one row and no bias is a
    reward model, whatever its config says. Any other is a Problem, or gets a new head by `fresh_head`."""
    config, shapes = config_of(folder), shapes_of(folder)
    labels, kind = shapes.get("score.weight", [None])[0], (config.architectures or ["?"])[0]
    if labels is None and not fresh_head:
        raise Problem(f"{folder}: {kind} has no reward head (score.weight in safetensors); "
                      f"train one: python reward.py --model {folder} --pairs …")
    if labels not in (None, 1) or "score.bias" in shapes:
        raise Problem(f"{folder}: a reward head has one label and no bias; this one has {labels} labels"
                      + " and a bias" * ("score.bias" in shapes))
    if labels is None:
        say(f"{folder} is a {kind} without a reward head, so training starts with a new one")
    config.num_labels = 1
    return config

def context_of(folder, config=None):
    """The longest sequence that the model takes, in tokens: its number of positions, or fewer with longrope,
    which reads chats beyond the original context differently, and with attention that is cut into chunks."""
    config = (config or config_of(folder)).get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise Problem(f"{folder}: {config.model_type} models are not supported (no max_position_embeddings)")
    rope = getattr(config, "rope_parameters", None) or {}
    ends = [kind["original_max_position_embeddings"] for kind in (rope, *rope.values())
            if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    chunk = getattr(config, "attention_chunk_size", None) or math.inf
    return min(config.max_position_embeddings, chunk, *ends)

def prompts_that_fit(folder, prompts, answer=1):
    """Return (prompts, their lengths in tokens) of those prompts that leave room for `answer` more tokens in
    the model's context. Raise a Problem if there are none."""
    tokenizer, context = load_tokenizer(folder), context_of(folder)
    lengths = share_work(len(prompts), lambda i: len(encode_chat(tokenizer, prompts[i])), "tokens")
    fit = [(prompt, length) for prompt, length in zip(prompts, lengths) if length + answer <= context]
    if not fit:
        raise Problem(f"{folder}: no prompt fits into its context of {context} tokens with an answer of "
                      f"{answer}; the shortest has {min(lengths)}")
    if len(fit) < len(prompts):
        say(f"{len(prompts) - len(fit)} of {len(prompts)} prompts are too long for {folder} and are left out")
    return map(list, zip(*fit))

def check_fits(folder, training=False):
    """Raise a Problem if a whole copy, or a process's share of a training, is too large for memory."""
    need = sum(map(math.prod, shapes_of(folder).values())) * (
        16 / world() if training else precision().itemsize)
    if need > memory():
        what = "training it" if training else "sampling or scoring with it"
        raise Problem(f"{folder}: {what} takes {need / 1e9:.3g} GB in each process, but a process has only "
                      f"{memory() / 1e9:.3g} GB; smaller batches can't help")

# ---------------------------------------------------------------- loading
def load_policy(folder, training=False):
    """Load a causal LM. Only rank 0 has its weights, until `replicate` or `training.shard` sends them."""
    return _load(AutoModelForCausalLM, folder, check_policy(folder), training)

def load_reward(folder, training=False, fresh_head=False, seed=0):
    """Load a reward model, or with `fresh_head` a causal LM, which gets a new head. Weights: as above."""
    config = check_reward(folder, fresh_head)
    torch.manual_seed(seed)  # the fresh head's
    model = _load(AutoModelForSequenceClassification, folder, config, training)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or model.score.bias is not None:
        raise Problem(f"{folder}: {type(model).__name__} has no linear head `score`, which is not supported")
    return model

def _load(kind, folder, config, training):
    check_fits(folder, training)
    # A sharded model refers to itself, so only a collection frees it. On CPUs that waits for a training.
    if torch.cuda.is_available() or training and dist.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
    dtype = torch.float32 if training else precision()
    with refusing(f"{folder}: can't be loaded as a model"):
        if rank() == 0:
            model, info = kind.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa",
                                               use_safetensors=True, output_loading_info=True)
            missing = sorted(n for n in info["missing_keys"] if not n.startswith("score."))  # a fresh head
            if missing:
                raise ValueError(f"weights are missing: {', '.join(missing[:3])}")
            unused = sorted(n for n in info["unexpected_keys"] if not n.startswith("lm_head."))
            if unused:
                raise ValueError(f"its files have weights that it does not take: {', '.join(unused[:3])}")
            loaded, config = [model], model.config
        config.tie_word_embeddings = on_rank0(lambda: is_tied(*loaded))  # the files decide, not the config
        if rank() > 0:
            with torch.device("meta"):
                model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.set_attn_implementation("packed")  # after loading, so that models without SDPA fail there
    model.context = context_of(folder, config)
    return model.eval()  # also in training: with dropout the policy would differ from its own reference

def is_tied(model):
    """Whether the head is the embedding. transformers does not tie them if the files have another head."""
    head = model.get_output_embeddings()
    return getattr(model.config, "tie_word_embeddings", False) and (
        head is None or head.weight is model.get_input_embeddings().weight)

# ---------------------------------------------------------------- saving
def precision():
    """The dtype in which forward passes compute on this device."""
    return torch.float32 if device().type == "cpu" else torch.bfloat16

READ_BACK = set()  # sources: the first model saved from each was read again

def save(root, source, folder):
    """Save root.model to `folder` for from_pretrained and vLLM, in the precision of its forward pass, with
    the tokenizer of the folder `source`. config.json comes last, so a folder that has one is complete."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(root, options=options) if dist.is_initialized() else root.state_dict()
    if rank() == 0:
        weights = {name.removeprefix("model."): w.to(precision()) for name, w in weights.items()}
        with refusing(f"{folder}: could not be saved"):  # for a full disk tokenizers raises a bare Exception
            _write(root.model, weights, source, Path(folder))
            if source not in READ_BACK:
                _read_back(type(root.model), weights, folder)
        READ_BACK.add(source)
    barrier()

def _read_back(kind, weights, folder):
    """Raise a Problem if transformers loads other weights than were saved."""
    for name, w in kind.from_pretrained(folder, dtype=precision()).state_dict().items():
        if name not in weights or not torch.equal(w.float(), weights[name].float()):
            raise Problem(f"{name} is not the same when it is loaded again")

def _say_changed(weights, source):
    """Say how many of the weights differ from those in the folder `source`."""
    changed = total = 0
    for name, old in weights_of(source).items():
        if name in weights and old.shape == weights[name].shape:
            changed += (old.to(weights[name].dtype) != weights[name]).sum().item()
            total += old.numel()
    if total:
        say(f"{changed / total:.1%} of the weights differ from those in {source}"
            + "; WARNING: NEXT TO NOTHING; train longer or with larger steps" * (changed < FEW * total))

def _write(model, weights, source, folder):
    damaged = [name for name, w in weights.items() if not w.isfinite().all()]
    if damaged:
        raise Problem(f"NaN or infinite numbers in {damaged[0]}; try a smaller learning rate")
    if model.config.tie_word_embeddings:
        weights = {name: w for name, w in weights.items() if name not in (model._tied_weights_keys or {})}
    weights = {name: w.clone() for name, w in revert_weight_conversion(model, weights).items()}
    _say_changed(weights, source)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    for generation in Path(source).glob("generation_config.json") if model.can_generate() else ():
        shutil.copy(generation, folder)
    model.config.architectures, model.config.dtype = [type(model).__name__], precision()
    model.config.save_pretrained(folder)
