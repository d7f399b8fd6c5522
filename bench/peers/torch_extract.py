"""A plain script on torch: `torch_extract.py BASE TUNED OUT [RANK]`. The difference in f32, torch.svd_lowrank with eight more columns and two
rounds, and what PEFT loads: what a careful user writes in twenty lines."""

import json
import os
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
base, tuned, out = sys.argv[1:4]
rank = int(sys.argv[4]) if len(sys.argv) > 4 else 16
os.makedirs(out, exist_ok=True)
torch.manual_seed(0)
factors = {}
for name in sorted(file for file in os.listdir(base) if file.endswith(".safetensors")):
    with safe_open(os.path.join(base, name), "pt") as before, safe_open(os.path.join(tuned, name), "pt") as after:
        for key in before.keys():
            if key.split(".")[-2] in LINEAR:
                change = after.get_tensor(key).float() - before.get_tensor(key).float()
                u, s, v = torch.svd_lowrank(change, q=rank + 8, niter=2)
                root, module = s[:rank].sqrt(), "base_model.model." + key.removesuffix(".weight")
                factors[module + ".lora_A.weight"] = (v[:, :rank] * root).T.contiguous()
                factors[module + ".lora_B.weight"] = (u[:, :rank] * root).contiguous()
save_file(factors, os.path.join(out, "adapter_model.safetensors"), metadata={"format": "pt"})
with open(os.path.join(out, "adapter_config.json"), "w") as file:
    json.dump({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": LINEAR, "base_model_name_or_path": base}, file)
