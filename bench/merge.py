#!/usr/bin/env python3
"""loratool beside its peers, in one run: `python3 bench/merge.py --work DIR [--size medium] [--rounds 5]`.

Each round runs every command once, in a shuffled order, on a warm source and with its output removed, so that a ratio is of two runs that
met the same machine. Every output is checked before a time counts. See bench/README.md for how to read the table.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(__file__))
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
MERGEKIT = "merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: {base}+{adapter}\n"


def main():
    args = arguments()
    os.makedirs(args.work, exist_ok=True)
    data = prepare(args)
    commands = list_commands(args, data)
    results = rounds(args, commands, lambda name: name in SLOW, lambda name: measure(name, commands[name], data))
    text = table(results)
    print(text)
    record(args, results, text)


def rounds(args, commands, is_slow, measure):
    """The runs of each command, one a round; of the slow ones, only in the first few rounds."""
    results = {name: [] for name in commands}
    for round_ in range(args.rounds):
        # Shuffled, the same way each time: rotation would let one command always inherit the page cache that another left.
        for name in random.Random(round_).sample(list(commands), len(commands)):
            if is_slow(name) and round_ >= args.peer_rounds:
                continue
            results[name].append(measure(name))
            print(f"round {round_ + 1}: {name}: {results[name][-1]['wall']:.2f} s", file=sys.stderr)
    return results


SLOW = ("PEFT", "torch script", "mergekit")
# Which commands each is divided by: what does the same work and promises the same.
OURS = ["loratool --no-sync", "loratool --in-place --no-sync"]
PAIRS = {"loratool": ["cp, sync"], "loratool --in-place": ["cp, sync"], "loratool --no-sync": ["cp"],
         "loratool --in-place --no-sync": ["cp"], "loratool, attention only, --no-sync": ["cp"],
         "loratool --in-place, attention only, --no-sync": ["cp"], "PEFT": OURS, "torch script": OURS, "mergekit": OURS}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="a folder for data and outputs, on the disk to measure")
    parser.add_argument("--size", choices=["small", "medium", "large"], default="medium")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds in which the slow peers take part")
    parser.add_argument("--mergekit", help="the program mergekit-yaml, if it is to take part")
    parser.add_argument("--no-peers", action="store_true", help="only loratool and cp")
    return parser.parse_args()


def prepare(args):
    """Builds loratool and makes the data, unless it is there."""
    import generate

    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
    folder = lambda name: os.path.join(args.work, f"{args.size}-{name}")
    data = {"base": folder("base"), "adapter": folder("adapter"), "attention": folder("attention"), "out": folder("out")}
    if not os.path.exists(data["base"]):
        generate.base(data["base"], args.size, 5_000_000_000 if args.size == "large" else 1_000_000_000)
    for name, targets in (("adapter", generate.ATTENTION + generate.MLP), ("attention", generate.ATTENTION)):
        if not os.path.exists(data[name]):
            generate.adapter(data[name], args.size, targets)
    data["config"], data["cache"] = folder("mergekit.yml"), folder("mergekit-cache")
    with open(data["config"], "w") as file:
        file.write(MERGEKIT.format(**data))
    return data


def list_commands(args, data):
    base, adapter, out = data["base"], data["adapter"], data["out"]
    program = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release", "loratool")
    merge = lambda adapter, *more: [program, "merge", base, "--adapter", adapter, "-o", out, "--quiet", *more]
    in_place = lambda adapter, *more: [program, "merge", out, "--adapter", adapter, "--in-place", "--quiet", *more]
    script = lambda name: [sys.executable, os.path.join(HERE, "peers", name), base, adapter, out]
    commands = {
        "cp": ["cp", "-r", base, out],
        "loratool --no-sync": merge(adapter, "--no-sync"),
        "cp, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/* "$1"', base, out],
        "loratool": merge(adapter),
        "loratool --in-place --no-sync": in_place(adapter, "--no-sync"),
        "loratool --in-place": in_place(adapter),
        "loratool, attention only, --no-sync": merge(data["attention"], "--no-sync"),
        "loratool --in-place, attention only, --no-sync": in_place(data["attention"], "--no-sync"),
    }
    if not args.no_peers:
        commands |= {"PEFT": script("peft_merge.py"), "torch script": script("torch_merge.py")}
        if args.mergekit:
            commands["mergekit"] = [args.mergekit, data["config"], out, "--no-write-model-card", "--no-copy-tokenizer",
                                    "--lora-merge-cache", data["cache"]]
    return commands


def measure(name, command, data):
    """One run, and the share of its values that are wrong."""
    sources = [data["base"], data["adapter"], data["attention"]]
    if "--in-place" not in name:
        found = run(name, command, [data["out"], data["cache"]], sources)
    else:
        for made in ("out", "cache"):
            shutil.rmtree(data[made], ignore_errors=True)
        shutil.copytree(data["base"], data["out"])
        found = run(name, command, [], sources + [data["out"]])
    return found | {"different": None if name.startswith("cp") else check(name, data)}


def run(name, command, outputs, sources, may_fail=False):
    """Wall, user and system seconds, bytes written, and the peak of the anonymous memory of the process itself."""
    for made in outputs:
        shutil.rmtree(made, ignore_errors=True)
    os.sync()
    for source in sources:
        warm(source)
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        peak, done = [0], threading.Event()
        watch = threading.Thread(target=watch_memory, args=(child.pid, done, peak))
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        done.set()
        watch.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0 and not may_fail:
            errors.seek(0)
            sys.exit(f"{name} failed: {errors.read().decode()}")
    return {"wall": wall, "user": usage.ru_utime, "system": usage.ru_stime, "anonymous_mib": peak[0] / 1024,
            "rss_mib": usage.ru_maxrss / 1024, "written_mb": usage.ru_oublock * 512 / 1e6}


def warm(folder):
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            while file.read(1 << 24):
                pass


def watch_memory(pid, done, peak):
    while not done.is_set():
        try:
            with open(f"/proc/{pid}/status") as status:
                peak[0] = max([peak[0]] + [int(line.split()[1]) for line in status if line.startswith("RssAnon")])
        except OSError:
            return
        time.sleep(0.005)


def check(name, data):
    """The share of changed values that differ from the product in f64, rounded once; the run ends if it is more than a peer's due.

    Rows are sampled from every tensor; tensors that no adapter changes must be equal in every byte.
    """
    import torch
    from safetensors import safe_open

    adapter = data["attention"] if "attention" in name else data["adapter"]
    tensors = lambda folder: {key: safe_open(os.path.join(folder, file), "pt") for file in sorted(os.listdir(folder))
                              if file.endswith(".safetensors") for key in safe_open(os.path.join(folder, file), "pt").keys()}
    base, factors, out = tensors(data["base"]), tensors(adapter), tensors(data["out"])
    if set(base) != set(out):
        sys.exit(f"{name}: the tensors of the output are not those of the base")
    wrong = total = 0
    for key in base:
        module = "base_model.model." + key.removesuffix(".weight")
        if module + ".lora_A.weight" not in factors:
            if not torch.equal(base[key].get_tensor(key), out[key].get_tensor(key)):
                sys.exit(f"{name}: {key} is not the base's")
            continue
        rows = slice(0, None, 97)
        weight = base[key].get_tensor(key)[rows].double()
        a = factors[module + ".lora_A.weight"].get_tensor(module + ".lora_A.weight").double()
        b = factors[module + ".lora_B.weight"].get_tensor(module + ".lora_B.weight")[rows].double()
        found = out[key].get_tensor(key)[rows]
        wrong += (found != rounded_once(weight + 2.0 * (b @ a))).sum().item()
        total += found.numel()
    share = wrong / total
    if share > (1e-6 if name.startswith("loratool") else 0.25):
        sys.exit(f"{name}: {share:.2%} of the values are wrong")
    return share


def rounded_once(values):
    """f64 to bf16. torch goes through f32 and rounds twice, unless the f32 is rounded to odd (Boldo and Melquiond 2008)."""
    import torch

    nearest = values.float()
    back, bits = nearest.double(), nearest.view(torch.int32)
    truncated = torch.where(back.abs() > values.abs(), bits - 1, bits)
    return torch.where(back == values, bits, truncated | 1).view(torch.float32).to(torch.bfloat16)


def table(results):
    lines = ["| command | s: min, median, max | ratio: median of the pairs (min to max; pairs) | MB written | MiB anonymous | wrong values |",
             "|---|---|---|---|---|---|"]
    for name, runs in results.items():
        walls, ratios = [run["wall"] for run in runs], []
        for other in PAIRS.get(name, []):
            if results.get(other) and runs:
                pairs = [run["wall"] / peer["wall"] for run, peer in zip(runs, results[other])]
                ratios.append(f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f}; {len(pairs)}) × {other}")
        wrong = "" if runs[0]["different"] is None else f"{max(run['different'] for run in runs):.4%}"
        memory, written = max(run["anonymous_mib"] for run in runs), statistics.median(run["written_mb"] for run in runs)
        seconds = f"{min(walls):.2f}, {statistics.median(walls):.2f}, {max(walls):.2f}"
        lines.append(f"| {name} | {seconds} | {'; '.join(ratios)} | {written:.0f} | {memory:.0f} | {wrong} |")
    return "\n".join(lines)


def record(args, results, text):
    """Writes what was measured, and on what kind of machine, to bench/record."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    # A run of uncommitted work says so: its commit alone does not reproduce it.
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip():
        commit += "-dirty"
    facts = {"date": datetime.date.today().isoformat(), "commit": commit, "size": args.size, "cpu": models[0],
             "cores": os.cpu_count(), "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30,
             "kernel": platform.release(), "file_system": file_system(args.work)}
    stem = os.path.join(HERE, "record", f"{facts['date']}-{args.size}-{commit}")
    with open(stem + ".json", "w") as file:
        json.dump(facts | {"runs": results}, file, indent=1)
    with open(stem + ".md", "w") as file:
        heading = ", ".join(f"{key} {value}" for key, value in facts.items())
        file.write(f"{heading}\n\n{text}\n")


def file_system(folder):
    return subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
