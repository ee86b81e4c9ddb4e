"""pytest tests/test_device.py

What a GPU would do, as far as a CPU can tell: no operation mixes tensors of two devices, and bf16 differs
from fp32 by its rounding. FSDP2 over several GPUs, NCCL and CUDA's own kernels are not tested here.
"""
import json
from pathlib import Path

import numpy as np
import pretend
import pytest
import torch.distributed as dist

from common import training
from common.data import write_jsonl

@pytest.fixture(scope="module")
def found(script, tiny, pairs, tmp_path_factory):
    """The results that tests/pretend.py prints."""
    folder = tmp_path_factory.mktemp("pretend")
    write_jsonl(folder / "pairs.jsonl", pairs[:12])
    done = script(Path(__file__).with_name("pretend.py"), tiny(), tiny(reward=True), folder / "pairs.jsonl",
                  folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

def test_training_sampling_and_scoring_on_another_device_give_what_the_cpu_gives(found):
    cpu, other = found["cpu"], found["pretend"]
    for line, same in zip(cpu["lines"], other["lines"], strict=True):
        assert line == pytest.approx(same, rel=1e-3, abs=1e-5)
    assert sum("loss" in line for line in cpu["lines"]) == 4 and len(cpu["samples"]) == 36
    assert cpu["samples"] == other["samples"] and found["went through"] == []  # no mixing of devices
    assert cpu["rewards"] == [pytest.approx(values, abs=1e-4) for values in other["rewards"]]
    assert cpu["logps"] == [pytest.approx(values, abs=1e-3) for values in other["logps"]]

def test_bf16_differs_from_fp32_by_no_more_than_its_eight_bits_explain(found):
    exact, rounded = found["pretend"], found["bf16"]
    assert (exact["dtype"], rounded["dtype"]) == ("torch.float32", "torch.bfloat16")
    for key in ("logps", "rewards"):
        one, other = np.array(exact[key]), np.array(rounded[key])
        off = np.abs(one - other) / one.std()
        assert 0 < off.mean() < 0.02 and off.max() < 0.1, key
    assert len(rounded["samples"]) == 36  # the sampler passed its check against plain forward passes

def test_training_in_fsdps_bf16_starts_at_ln_2_and_follows_training_in_fp32(tiny, pairs, monkeypatch):
    def losses():
        lines = pretend.train(tiny(), tiny(reward=True), pairs[:12])
        return [line["loss"] for line in lines if "loss" in line]

    exact = losses()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(training, "MixedPrecisionPolicy", lambda: training.BF16)  # as on a GPU
        rounded = losses()
    finally:
        dist.destroy_process_group()
    off = np.abs(np.subtract(exact, rounded))
    assert len(off) == 4 and (0 < off[1:]).all() and off.max() < 0.02
    assert rounded[0] == pytest.approx(np.log(2), abs=1e-3)  # policy and reference round alike
