#!/usr/bin/env python3
"""Extraction side by side: `python3 bench/extract.py --work DIR [--mergekit PATH] [--rounds 5]`, rank 16 on all linear layers of 1.1B parameters.

The change has rank 32 with singular values 0.85^i, or with --slow i^-0.5 up to 512, and is rounded to bf16 on top of the base. mergekit runs on
one and on three layers, from which its time for all is concluded, because it takes minutes. Every output is checked against the dense singular
values of one layer before a time counts.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.dirname(__file__))
import merge as harness

HERE, ROOT = harness.HERE, harness.ROOT
RANK, CUTS = 16, (1, 3)
CHECKED = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]


def main():
    args = arguments()
    os.makedirs(args.work, exist_ok=True)
    data = prepare(args)
    best = best_errors(data)
    commands = list_commands(args, data)

    def measure(name):
        run = harness.run(name, commands[name], [data["out"]], [data["base"], data["tuned"]], args.offline_failure(name))
        return run | {"excess": excess(name, data, best)}

    results = harness.rounds(args, commands, lambda name: name != "loratool", measure)
    text = table(results)
    print(text)
    harness.record(args, results, text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="a folder for data and outputs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds in which the peers take part")
    parser.add_argument("--mergekit", help="the program mergekit-extract-lora, if it is to take part")
    parser.add_argument("--slow", action="store_true", help="a change with a slow spectrum")
    args = parser.parse_args()
    args.size = "extract-slow" if args.slow else "extract"
    # Without a network it fails at the model card, after the adapter is written.
    args.offline_failure = lambda name: name.startswith("mergekit")
    return args


def prepare(args):
    import generate

    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
    folder = lambda name: os.path.join(args.work, f"medium-{name}")
    data = {"base": folder("base"), "tuned": folder("tuned-slow" if args.slow else "tuned"), "out": folder("extracted")}
    if not os.path.exists(data["base"]):
        generate.base(data["base"], "medium", 1_000_000_000)
    if not os.path.exists(data["tuned"]):
        generate.tuned(data["base"], data["tuned"], args.slow)
    for layers in CUTS if args.mergekit else ():
        for side in ("base", "tuned"):
            data[side, layers] = f"{data[side]}-{layers}"
            if not os.path.exists(data[side, layers]):
                generate.cut(data[side], data[side, layers], layers)
    return data


def list_commands(args, data):
    base, tuned, out = data["base"], data["tuned"], data["out"]
    program = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release", "loratool")
    commands = {"loratool": [program, "extract", "--base", base, "--tuned", tuned, "--rank", str(RANK), "-o", out, "--quiet"],
                "torch script": [sys.executable, os.path.join(HERE, "peers", "torch_extract.py"), base, tuned, out, str(RANK)]}
    for layers in CUTS if args.mergekit else ():
        commands[f"mergekit, {layers} of 22 layers"] = [
            args.mergekit, "--model", data["tuned", layers], "--base-model", data["base", layers], "--out-path", out, "--max-rank", str(RANK),
            "--skip-undecomposable", "-e", "embed_tokens|lm_head"]
    return commands


def change(data, key):
    import torch
    from safetensors import safe_open

    for file in sorted(os.listdir(data["base"])):
        if file.endswith(".safetensors"):
            with safe_open(os.path.join(data["base"], file), "pt") as before, safe_open(os.path.join(data["tuned"], file), "pt") as after:
                if key in before.keys():
                    return after.get_tensor(key).double() - before.get_tensor(key).double()
    sys.exit(f"no tensor {key}")


def best_errors(data):
    """The smallest error at the rank, by Eckart and Young, from dense singular values."""
    import torch

    values = {key: torch.linalg.svdvals(change(data, key)) for key in CHECKED}
    return {key: (s[RANK:] ** 2).sum().sqrt().item() for key, s in values.items()}


def excess(name, data, best):
    """The largest excess of the error over the smallest possible one, over three weights of the first layer."""
    import json

    from safetensors.torch import load_file

    factors = load_file(os.path.join(data["out"], "adapter_model.safetensors"))
    with open(os.path.join(data["out"], "adapter_config.json")) as file:
        config = json.load(file)
    worst = 0.0
    for key in CHECKED:
        module = "base_model.model." + key.removesuffix(".weight")
        a, b = (factors[f"{module}.lora_{part}.weight"].double() for part in "AB")
        error = (change(data, key) - config["lora_alpha"] / config["r"] * b @ a).norm().item()
        worst = max(worst, error / best[key] - 1)
    if worst > (1e-3 if name == "loratool" else 0.1):
        sys.exit(f"{name}: the error is {worst:.2%} above the smallest possible one")
    return worst


def table(results):
    ours = results["loratool"]
    lines = ["| command | s: min, median, max | × loratool: median of the pairs (min to max; pairs) | MiB anonymous | excess error |", "|---|---|---|---|---|"]
    row = lambda name, walls, ratios, memory, worst: lines.append(
        f"| {name} | {min(walls):.2f}, {statistics.median(walls):.2f}, {max(walls):.2f} | {ratios} | {memory} | {worst} |")
    of = lambda walls: [wall / run["wall"] for wall, run in zip(walls, ours)]
    shown = lambda ratios: f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}; {len(ratios)})"
    for name, runs in results.items():
        walls = [run["wall"] for run in runs]
        ratios = "" if name == "loratool" or "layers" in name else shown(of(walls))
        row(name, walls, ratios, f"{max(run['anonymous_mib'] for run in runs):.0f}", f"{max(run['excess'] for run in runs):.4%}")
    few, more = (results.get(f"mergekit, {layers} of 22 layers") for layers in CUTS)
    if few and more:
        each = [(m["wall"] - f["wall"]) / (CUTS[1] - CUTS[0]) for f, m in zip(few, more)]
        walls = [f["wall"] + (22 - CUTS[0]) * e for f, e in zip(few, each)]
        row("mergekit, all layers, concluded", walls, shown(of(walls)), "", "")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
