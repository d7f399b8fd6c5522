#!/usr/bin/env python3
"""Combination side by side: `python3 bench/combine.py --work DIR [--rounds 5]`, adapters of rank 16 on all linear layers of 1.1B parameters
and of the shape of a 7B model, with weights 1, 1/2, 1/3, …

loratool puts the factors side by side, and finds the best update of rank 16, of two and of ten adapters; PEFT does `linear`, `cat` and, on one
and on two layers, from which its time for all is concluded, `svd`. The rank-16 results are checked against dense singular values.
"""

import argparse
import os
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.dirname(__file__))
import merge as harness

HERE, ROOT = harness.HERE, harness.ROOT
RANK, CUTS, LAYERS = 16, (1, 2), {"medium": 22, "large": 32}
CHECKED = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]


def main():
    args = arguments()
    os.makedirs(args.work, exist_ok=True)
    data = prepare(args)
    commands = list_commands(args, data)

    def measure(name):
        sources = {word.rsplit(":", 1)[0] for word in commands[name]} - {data["out"]}
        run = harness.run(name, commands[name], [data["out"]], [path for path in sources if os.path.isdir(path)])
        return run | {"off": off(commands[name], data["out"])} if "rank 16" in name else run

    results = harness.rounds(args, commands, lambda name: name.startswith("PEFT") or ", ties" in name, measure)
    text = table(results)
    print(text)
    harness.record(args, results, text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="a folder for data and outputs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds in which PEFT takes part")
    args = parser.parse_args()
    args.size = "combine"
    return args


def prepare(args):
    import generate

    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
    folder = lambda name: os.path.join(args.work, name)
    data = {"out": folder("combined"), "base": folder("medium-base")}
    targets = generate.ATTENTION + generate.MLP
    if not os.path.exists(data["base"]):
        generate.base(data["base"], "medium", 1_000_000_000)
    for layers in CUTS:
        data["base", layers] = folder(f"medium-base-{layers}")
        if not os.path.exists(data["base", layers]):
            generate.cut(data["base"], data["base", layers], layers)
    for size, layers, count in [("medium", None, 10), ("large", None, 10), ("medium", 1, 2), ("medium", 2, 2)]:
        data[size, layers] = [folder(f"{size}-{layers or 'all'}-adapter-{i}") for i in range(count)]
        for seed, path in enumerate(data[size, layers]):
            if not os.path.exists(path):
                generate.adapter(path, size, targets, RANK, seed + 1, layers)
    return data


def list_commands(args, data):
    program = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release", "loratool")
    weighted = lambda paths: [f"{path}:{1 / (i + 1)}" for i, path in enumerate(paths)]
    ours = lambda paths, *how: [program, "combine", *weighted(paths), *how, "-o", data["out"], "--quiet"]
    peft = lambda base, kind, paths: [sys.executable, os.path.join(HERE, "peers", "peft_combine.py"), base, data["out"], kind, *paths]
    medium, large = data["medium", None], data["large", None]
    commands = {"loratool, sum of 2": ours(medium[:2]), "loratool, cat of 2": ours(medium[:2], "--method", "cat")}
    for name, paths in [("1.1B", medium), ("7B", large)]:
        for count in (2, 10):
            commands[f"loratool, {count} of {name} to rank 16"] = ours(paths[:count], "--rank", str(RANK))
    for method in ("ties", "knots", "core-space", "tsv", "iso-c"):
        commands[f"loratool, {method} of 2"] = ours(medium[:2], "--method", method, "--rank", str(RANK))
    commands |= {f"PEFT, {kind} of 2": peft(data["base"], kind, medium[:2]) for kind in ("linear", "cat")}
    commands |= {f"PEFT, svd of 2, {n} layers": peft(data["base", n], "svd", data["medium", n]) for n in CUTS}
    return commands


def off(command, out):
    """The excess of the error over that of the best update of rank 16, of three weights."""
    import torch
    from safetensors import safe_open

    inputs = [word.rsplit(":", 1) for word in command if ":" in word]
    worst = 0.0
    with safe_open(os.path.join(out, "adapter_model.safetensors"), "pt") as made:
        key = lambda module, part: next(k for k in made.keys() if k.endswith(f"{module}.lora_{part}.weight"))
        for module in CHECKED:
            wanted = 0
            for path, weight in inputs:
                with safe_open(os.path.join(path, "adapter_model.safetensors"), "pt") as file:
                    read = lambda part: file.get_tensor(f"base_model.model.{module}.lora_{part}.weight").double()
                    wanted = wanted + 2 * float(weight) * (read("B") @ read("A"))
            found = made.get_tensor(key(module, "B")).double() @ made.get_tensor(key(module, "A")).double()
            # The singular values of a product of thin matrices are those of its triangles; here of the dense product, by its Gram matrix.
            gram = wanted @ wanted.T if wanted.shape[0] < wanted.shape[1] else wanted.T @ wanted
            values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
            worst = max(worst, float((wanted - found).norm() / values[RANK:].sum().sqrt()) - 1)
    return worst


def table(results):
    median = lambda name, key: statistics.median(run[key] for run in results[name])
    rows = ["| what | seconds: min, median, max | anonymous MiB | error above the best |", "|---|---|---|---|"]
    for name, runs in results.items():
        walls = [run["wall"] for run in runs]
        excess = f"{100 * max(run['off'] for run in runs):.4f} %" if "off" in runs[0] else ""
        memory = max(run["anonymous_mib"] for run in runs)
        rows.append(f"| {name} | {min(walls):.2f}, {statistics.median(walls):.2f}, {max(walls):.2f} | {memory:.0f} | {excess} |")
    one, two = (median(f"PEFT, svd of 2, {n} layers", "wall") for n in CUTS)
    svd = one + (LAYERS["medium"] - 1) * (two - one)
    ratio = svd / median("loratool, 2 of 1.1B to rank 16", "wall")
    rows += ["", f"PEFT's svd of all {LAYERS['medium']} layers, from one and two: {svd:.0f} s, {ratio:.0f} times loratool's."]
    for ours, theirs in (("sum", "linear"), ("cat", "cat")):
        ratio = median(f"PEFT, {theirs} of 2", "wall") / median(f"loratool, {ours} of 2", "wall")
        rows.append(f"PEFT's {theirs}, the whole process: {ratio:.1f} times loratool's {ours}.")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
