"""Llama-shaped bf16 checkpoints and PEFT adapters of random values, the same on every machine.

Values are normal, scaled like those of a trained model, from one buffer at a different offset per tensor: making a 13 GB checkpoint
must not cost more than writing it, and no tensor may be a copy of another.
"""

import json
import os

import torch
from safetensors.torch import load_file, save_file

#          hidden layers inner heads kv-heads
SIZES = {"small": (512, 8, 1408, 8, 4), "medium": (2048, 22, 5632, 32, 4), "large": (4096, 32, 11008, 32, 32)}
VOCABULARY = 32000
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def config(size):
    hidden, layers, inner, heads, kv = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": hidden // heads,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }


def shapes(size):
    """Names and shapes in the order of the files."""
    hidden, layers, inner, heads, kv = SIZES[size]
    narrow = kv * (hidden // heads)
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(layers):
        of = f"model.layers.{layer}."
        yield of + "input_layernorm.weight", (hidden,)
        yield of + "mlp.down_proj.weight", (hidden, inner)
        yield of + "mlp.gate_proj.weight", (inner, hidden)
        yield of + "mlp.up_proj.weight", (inner, hidden)
        yield of + "post_attention_layernorm.weight", (hidden,)
        yield of + "self_attn.k_proj.weight", (narrow, hidden)
        yield of + "self_attn.o_proj.weight", (hidden, hidden)
        yield of + "self_attn.q_proj.weight", (hidden, hidden)
        yield of + "self_attn.v_proj.weight", (narrow, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def base(folder, size, shard_bytes):
    """Writes a checkpoint in shards of at most `shard_bytes`."""
    os.makedirs(folder)
    write_json(folder, "config.json", config(size))
    noise = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))
    shards = [[]]
    for name, shape in shapes(size):
        taken = sum(2 * torch.Size(s).numel() for _, s in shards[-1])
        if shards[-1] and taken + 2 * torch.Size(shape).numel() > shard_bytes:
            shards.append([])
        shards[-1].append((name, shape))
    where, total, number = {}, 0, 0
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shard:
            number += 1
            tensors[name] = values(noise, number, shape)
            where[name], total = file, total + 2 * tensors[name].numel()
        save_file(tensors, os.path.join(folder, file), metadata={"format": "pt"})
    write_json(folder, "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def values(noise, number, shape):
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    count, start = torch.Size(shape).numel(), number * 102947 % (noise.numel() // 2)
    scale = (1 + 0.01 * (number % 17)) / shape[1] ** 0.5
    out, done = torch.empty(count, dtype=torch.bfloat16), 0
    while done < count:
        part = noise[start : start + count - done]
        out[done : done + part.numel()] = part * scale
        start, done = 0, done + part.numel()
    return out.view(shape)


def adapter(folder, size, targets, rank=16, seed=1, layers=None):
    """Writes a PEFT adapter in f32 with alpha = 2 · rank, of the first layers if so many are given."""
    os.makedirs(folder)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(size):
        if name.split(".")[-2] in targets and (layers is None or int(name.split(".")[2]) < layers):
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[module + ".lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
            tensors[module + ".lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.02
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets,
              "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    write_json(folder, "adapter_config.json", fields)


def tuned(base, folder, slow):
    """Writes the base with a change of 5 % in all linear layers: of rank 32, singular values 0.85^i, or if slow of rank 512, i^-0.5."""
    os.makedirs(folder)
    write_json(folder, "config.json", config("medium"))
    with open(os.path.join(base, "model.safetensors.index.json")) as file:
        write_json(folder, "model.safetensors.index.json", json.load(file))
    generator = torch.Generator().manual_seed(2)
    values = torch.arange(1, 513.0) ** -0.5 if slow else 0.85 ** torch.arange(32.0)
    for file in sorted(name for name in os.listdir(base) if name.endswith(".safetensors")):
        tensors = load_file(os.path.join(base, file))
        for name in tensors:
            if name.split(".")[-2] in ATTENTION + MLP:
                weight = tensors[name].float()
                rank = min(len(values), *weight.shape)
                left = torch.randn(weight.shape[0], rank, generator=generator) / weight.shape[0] ** 0.5
                right = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
                size = 0.05 * weight.norm() / values[:rank].norm()
                tensors[name] = (weight + (left * values[:rank] * size) @ right).bfloat16()
        save_file(tensors, os.path.join(folder, file), metadata={"format": "pt"})


def cut(source, folder, layers):
    """Writes the first layers of a checkpoint as one of its own."""
    os.makedirs(folder)
    write_json(folder, "config.json", config("medium") | {"num_hidden_layers": layers})
    kept = {}
    for file in sorted(name for name in os.listdir(source) if name.endswith(".safetensors")):
        number = lambda name: int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        kept |= {name: tensor for name, tensor in load_file(os.path.join(source, file)).items() if number(name) < layers}
    save_file(kept, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w") as file:
        json.dump(value, file, indent=1)
