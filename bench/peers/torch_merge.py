"""What an expert writes by hand: shard by shard, the product in f32, rounded once. torch_merge.py BASE ADAPTER OUT."""

import json
import os
import shutil
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

base, adapter, out = sys.argv[1:]
os.makedirs(out)
with open(os.path.join(adapter, "adapter_config.json")) as file:
    fields = json.load(file)
scale = fields["lora_alpha"] / fields["r"]
factors = load_file(os.path.join(adapter, "adapter_model.safetensors"))
with torch.inference_mode():
    for name in sorted(os.listdir(base)):
        path = os.path.join(base, name)
        if not name.endswith(".safetensors"):
            shutil.copy(path, out)
            continue
        merged = {}
        with safe_open(path, "pt") as shard:
            for key in shard.keys():
                weight = shard.get_tensor(key)
                module = "base_model.model." + key.removesuffix(".weight")
                if module + ".lora_A.weight" in factors:
                    a, b = factors[module + ".lora_A.weight"], factors[module + ".lora_B.weight"]
                    weight = weight.float().addmm_(b, a, alpha=scale).bfloat16()
                merged[key] = weight
        save_file(merged, os.path.join(out, name), metadata={"format": "pt"})
