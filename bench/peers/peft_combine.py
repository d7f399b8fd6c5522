"""PEFT's `add_weighted_adapter`: peft_combine.py BASE OUT TYPE ADAPTER...; prints the seconds of the combination alone."""

import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, out, kind, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
names = [f"a{i}" for i in range(len(adapters))]
model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
for name, path in zip(names[1:], adapters[1:]):
    model.load_adapter(path, adapter_name=name)
start = time.perf_counter()
options = {"svd_rank": 16} if kind.endswith("svd") else {}
model.add_weighted_adapter(names, [1.0 / (i + 1) for i in range(len(names))], "made", combination_type=kind, **options)
print(time.perf_counter() - start)
model.save_pretrained(out, selected_adapters=["made"])
