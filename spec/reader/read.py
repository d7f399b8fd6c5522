#!/usr/bin/env python3
"""A second reader, written from the text of spec/ alone: standard library only, nothing shared with the tool or with make.py.

    read.py PATH              prints {"outcome": class, "rule": id} and what is worth a warning
    read.py --vectors DIR     reads every vector of DIR/manifest.json; exits 1 if one outcome, rule, warning, root or value differs

It reads whole files into memory, knows no base, and is a reader of level 2 (container.md, section 10).
"""
import hashlib, json, math, os, re, struct, sys

BITS = {d: b for b, ds in {64: "F64 I64 U64 C64", 32: "F32 I32 U32", 16: "F16 BF16 I16 U16", 6: "F6_E2M3 F6_E3M2", 4: "F4",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"}.items() for d in ds.split()}
FLOATS = {"F64": "d", "F32": "f", "F16": "e"}
KINDS = {"linear": 2, "linear_transposed": 2, "embedding": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5, "experts": 3}
IMPLEMENTED = {"linear_transposed", "embedding", "lora_bias", "replacements"}
CLASSES = {"C-003": "limit", "C-021": "limit", "C-022": "limit", "A-003": "limit", "P-005": "limit", "K-013": "limit", "C-037": "integrity",
           "C-038": "integrity", "A-008": "numeric", "K-001": "io", "K-004": "io", "K-009": "io", "P-019": "io", "C-032": "mismatch"}
FORMAT_P = {"P-001", "P-002", "P-004"}


class Broken(Exception):
    def __init__(self, rule, message=""):
        super().__init__(message)
        self.rule = rule
        self.outcome = CLASSES.get(rule) or ("mismatch" if rule[0] in "AP" and rule not in FORMAT_P else "format")


def need(ok, rule, message=""):
    if not ok:
        raise Broken(rule, message)


# --- JSON as container.md, section 2 restricts it ----------------------------------------------------------------------------
class Object(dict):
    """A JSON object that remembers the keys that occurred twice."""
    def __init__(self, pairs):
        super().__init__(pairs)
        keys = [k for k, _ in pairs]
        self.twice = {k for k in keys if keys.count(k) > 1} if len(self) < len(keys) else set()


def parse_json(text, rule, begin=0, deep=None):
    """The value at `begin` and the place after it; `deep` is the rule for nesting that is too deep."""
    def no_constant(token):
        raise ValueError(token)

    def finite(token):
        value = float(token)
        need(math.isfinite(value), rule, token)
        return value

    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        need(depth <= 127, deep or rule, "nested too deeply")
    number = lambda token: finite(token) if token == "-0" else int(token) if math.isfinite(finite(token)) else None
    try:
        decoder = json.JSONDecoder(object_pairs_hook=Object, parse_constant=no_constant, parse_float=finite, parse_int=number)
        value, end = decoder.raw_decode(text, begin)
    except (ValueError, RecursionError) as e:
        raise Broken(rule, str(e))
    for s in strings(value):
        need(not any(0xD800 <= ord(c) <= 0xDFFF for c in s), rule, "a lone surrogate")
    return value, end


def strings(v):
    if isinstance(v, str):
        yield v
    for x in [*v, *v.values()] if isinstance(v, dict) else v if isinstance(v, list) else []:
        yield from strings(x)


def repeated(v):
    inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else []
    return bool(getattr(v, "twice", None)) or any(map(repeated, inner))


def document(data, rule, twice):
    """A whole JSON object from bytes; white space may surround it."""
    try:
        text = data if isinstance(data, str) else data.decode()
    except UnicodeDecodeError as e:
        raise Broken(rule, str(e))
    need(not text.startswith("\ufeff"), rule, "a byte order mark")
    value, end = parse_json(text, rule, len(text) - len(text.lstrip(" \t\r\n")))
    need(not text[end:].strip(" \t\r\n"), rule, "more after the object")
    need(isinstance(value, dict), rule, "not an object")
    need(not twice or not repeated(value), twice, "a key occurs twice")
    return value


is_int = lambda v: isinstance(v, int) and not isinstance(v, bool)
is_uint = lambda v: is_int(v) and v >= 0
is_num = lambda v: is_int(v) or isinstance(v, float)
is_hex = lambda v: isinstance(v, str) and bool(re.fullmatch("[0-9a-f]{64}", v))
is_str = lambda v: isinstance(v, str)
strs = lambda v: isinstance(v, list) and all(map(is_str, v))
one_of = lambda *listed: lambda v: is_str(v) and v in listed

# --- the file: C-001 to C-023 ------------------------------------------------------------------------------------------------
SIGNATURES = [b"version https://git-lfs", b"PK\3\4", b"PK\5\6", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5", b"\x1f\x8b\x08", b"\x93NUMPY", b"\x89HDF", b"GGUF"]


class File:
    def __init__(self, data, warn=None):
        """`warn` is a list for what a base checkpoint may have; without it, the file is an adapter and strict."""
        self.tensors, self.metadata = {}, {}
        need(len(data) >= 8, "C-001")
        n = struct.unpack("<Q", data[:8])[0]
        if n > 100_000_000 or 8 + n > len(data):
            text = all(b in b"\t\n\r" or 0x20 <= b <= 0x7E for b in data[:8])
            need(not (text or any(map(data.startswith, SIGNATURES))), "C-020")
        need(n > 0, "C-002")
        need(n <= 100_000_000, "C-003")
        need(8 + n <= len(data), "C-004")
        head, self.body = data[8:8 + n], data[8 + n:]
        try:
            text = head.decode()
        except UnicodeDecodeError as e:
            raise Broken("C-005", str(e))
        need(not text.startswith("\ufeff"), "C-005")
        spaces = len(text) - len(text.lstrip(" "))
        if spaces and warn is not None:
            warn.append("C-006")
        need(not re.match(r'[\["\dntf-]', text[spaces:]), "C-007")
        need(text[spaces:spaces + 1] == "{" and (not spaces or warn is not None), "C-006")
        value, end = parse_json(text, "C-007", spaces, "C-010")
        need(not text[end:].strip(" "), "C-007")
        self.read_entries(value, warn)

    def read_entries(self, head, warn):
        meta = head.pop("__metadata__", {})
        if meta is None:
            meta = {}
            if warn is not None:
                warn.append("C-009")
        need("__metadata__" not in head.twice and isinstance(meta, dict) and not getattr(meta, "twice", None)
             and all(map(is_str, meta.values())), "C-009")
        need(not head.twice, "C-008")
        need(len(head) <= 1_000_000, "C-021")
        need(all(len(v.encode()) <= 32 << 20 for v in meta.values()), "C-022")
        self.metadata = meta
        for name, e in head.items():
            need(1 <= len(name.encode()) <= 1024 and not re.search("[\0-\x1f\x7f-\x9f]", name), "C-019", name)
            need(isinstance(e, dict) and not e.twice and {"dtype", "shape", "data_offsets"} <= set(e), "C-010", name)
            if len(e) > 3:
                need(warn is not None, "C-010", name)
                warn.append("C-010")
            dtype, shape, offsets = e["dtype"], e["shape"], e["data_offsets"]
            need(is_str(dtype) and dtype in BITS, "C-011", name)
            need(isinstance(shape, list) and all(is_uint(d) and d < 2**63 for d in shape), "C-012", name)
            need(isinstance(offsets, list) and len(offsets) == 2 and all(map(is_uint, offsets)) and offsets[0] <= offsets[1], "C-014", name)
            need(math.prod(d for d in shape if d) < 2**63, "C-013", name)
            need(math.prod(shape) * BITS[dtype] == 8 * (offsets[1] - offsets[0]), "C-013", name)
            need(offsets[1] <= len(self.body), "C-015", name)
            self.tensors[name] = (dtype, shape, *offsets)
        at = 0
        for name, (_, _, begin, end) in sorted(self.tensors.items(), key=lambda t: t[1][2:]):
            need(begin <= at, "C-016", name)
            need(begin >= at, "C-017", name)
            at = end
        need(at == len(self.body), "C-018")

    def shape(self, name):
        return self.tensors[name][1]

    def data(self, name):
        return self.body[self.tensors[name][2]:self.tensors[name][3]]

    def values(self, name):
        dtype, data = self.tensors[name][0], self.data(name)
        if dtype == "BF16":
            return [struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)]
        return [v for v, in struct.iter_unpack("<" + FLOATS[dtype], data)]


def digest(dtype, shape, data):
    text = b"loratool.tensor.v1\0" + dtype.encode() + struct.pack(f"<x{len(shape) + 1}Q", len(shape), *shape)
    return hashlib.sha256(text + data).hexdigest()


def root(digests):
    return hashlib.sha256(b"".join(b"%s\0%s\n" % line for line in sorted((n.encode(), d.encode()) for n, d in digests.items()))).hexdigest()


# --- the adapter: A-002 to A-012 ---------------------------------------------------------------------------------------------
def formula(t):
    return t["alpha"] / (t["rank"] if t["scaling"] == "alpha/rank" else math.sqrt(t["rank"]))


def check_adapter(file, targets, replacements, warn):
    """`targets` as in the manifest, `replacements` as pairs (base tensor, tensor of the file)."""
    for t in targets:
        a, b, delta = file.shape(t["a"]), file.shape(t["b"]), t.get("bias", {}).get("delta")
        for name in [t["a"], t["b"]] + ([delta] if delta else []):
            need(file.tensors[name][0] in (*FLOATS, "BF16"), "A-005", name)
        need(len(a) == len(b) == 2 and a[1] and b[0], "A-004", t["a"])
        need(a[0] == b[1] >= 1, "A-002", t["a"])
        need(not delta or file.shape(delta) == [b[0]], "A-004", delta)
        need(a[0] <= 4096, "A-003", t["a"])
        warn += ["A-003"] if a[0] > min(a[1], b[0]) else []
        need(math.isfinite(t["alpha"]) and t["alpha"] != 0 and formula(t) != 0, "A-006", t["tensor"])
        need(t["alpha"] > 0, "A-007", t["tensor"])
        warn += ["A-007"] if formula(t) > 1000 else []
    for _, name in replacements:
        need(file.tensors[name][0] in (*FLOATS, "BF16"), "A-005", name)
    updated = [t["tensor"] for t in targets] + [t["bias"]["tensor"] for t in targets if "bias" in t]
    replaced = [tensor for tensor, _ in replacements]
    need(len(updated) == len(set(updated)) and len(replaced) == len(set(replaced)), "A-009")
    need(updated or replaced, "A-012")


def check_finite(file):
    for name in file.tensors:
        need(all(map(math.isfinite, file.values(name))), "A-008", name)


# --- the container: C-030 to C-042 -------------------------------------------------------------------------------------------
TARGET = {"tensor": is_str, "kind": one_of(*KINDS), "shape": lambda v: isinstance(v, list) and all(is_uint(d) and d < 2**63 for d in v),
          "a": is_str, "b": is_str, "rank": is_uint, "alpha": is_num, "scaling": one_of("alpha/rank", "alpha/sqrt(rank)"), "scale": is_num}
OBJECT, LIST, NULL = (lambda v: isinstance(v, dict)), (lambda v: isinstance(v, list)), (lambda v: v is None or is_str(v))
MANIFEST = {"container": is_str, "required": strs, "optional": strs, "base": OBJECT, "targets": LIST, "replacements": LIST, "digests": OBJECT,
            "content": is_str, "lineage": lambda v: True}


def members(value, listed, optional=(), rule="C-033"):
    need(isinstance(value, dict), rule)
    known = {k: v for k, v in value.items() if not k.startswith("x-")}
    need(set(listed) <= set(known) <= set(listed) | set(optional), rule, str(set(known) ^ set(listed)))
    for key, test in listed.items():
        need(test(value[key]), rule, key)


def read_container(file, warn):
    need("loratool.manifest" in file.metadata, "C-030")
    m = document(file.metadata["loratool.manifest"], "C-030", "C-030")
    need(file.metadata.get("format") == "pt", "C-041")
    version = m.get("container")
    need(is_str(version), "C-033")
    need(re.fullmatch(r"1\.(0|[1-9][0-9]*)", version), "C-031", version)
    need(strs(m.get("required")), "C-033")
    need(set(m["required"]) <= IMPLEMENTED, "C-032", str(m["required"]))
    members(m, MANIFEST, ["origin"])
    members(m["base"], {"name": NULL, "structure": NULL, "targets": NULL})
    for t in m["targets"]:
        members(t, {**TARGET, "axes": one_of("in_out", "out_in")} if isinstance(t, dict) and t.get("kind") == "experts" else TARGET, ["bias"])
        if "bias" in t:
            members(t["bias"], {"tensor": is_str, "delta": is_str})
    for r in m["replacements"]:
        members(r, {"tensor": is_str, "with": is_str})
    if "origin" in m:
        members(m["origin"], {"dialect": is_str, "config": OBJECT})
    need(all(map(is_str, m["digests"].values())), "C-033")
    used = {t["kind"] for t in m["targets"]} - {"linear"} | {"lora_bias" for t in m["targets"] if "bias" in t} | {"replacements" for _ in m["replacements"]}
    need(used <= set(m["required"]), "C-033", str(used))
    need(isinstance(m["lineage"], list), "C-042")
    for record in m["lineage"]:
        members(record, {"op": is_str, "tool": is_str, "inputs": LIST, "parameters": OBJECT}, rule="C-042")
        for i in record["inputs"]:
            members(i, {"role": is_str, "dialect": is_str, "content": is_hex}, rule="C-042")
    need(all(map(is_hex, [m["content"], *m["digests"].values()])), "C-039")
    need(all(v is None or is_hex(v) for v in (m["base"]["structure"], m["base"]["targets"])), "C-039")
    named = [n for t in m["targets"] for n in (t["a"], t["b"], *([t["bias"]["delta"]] if "bias" in t else []))] + [r["with"] for r in m["replacements"]]
    need(sorted(named) == sorted(file.tensors) == sorted(m["digests"]), "C-034")
    for t in m["targets"]:
        a, b = file.shape(t["a"]), file.shape(t["b"])
        need(len(a) == len(b) == KINDS[t["kind"]] == 2 and a[0] == b[1] == t["rank"], "C-035", t["tensor"])
        need(t["shape"] == ([b[0], a[1]] if t["kind"] == "linear" else [a[1], b[0]]), "C-035", t["tensor"])
        need(not t["rank"] or abs(t["scale"] - formula(t)) <= 1e-12 * abs(formula(t)), "C-036", t["tensor"])
    need(m["content"] == root(m["digests"]), "C-038")
    check_adapter(file, m["targets"], [(r["tensor"], r["with"]) for r in m["replacements"]], warn)
    for name, (dtype, shape, _, _) in file.tensors.items():
        need(m["digests"][name] == digest(dtype, shape, file.data(name)), "C-037", name)
    check_finite(file)
    return m


def delta(file, m, tensor, place):
    """One element of the update, in the orientation of the base tensor (adapter-model.md, A-034)."""
    t = next(t for t in m["targets"] if t["tensor"] == tensor)
    i, j = place if t["kind"] == "linear" else reversed(place)
    a, b, inner, total = file.values(t["a"]), file.values(t["b"]), file.shape(t["a"])[1], 0.0
    for k in range(t["rank"]):
        total += b[i * t["rank"] + k] * a[k * inner + j]
    return formula(t) * total


# --- PEFT: mapping/peft.md ---------------------------------------------------------------------------------------------------
is_bool = lambda v: isinstance(v, bool)
pattern_of = lambda ok: lambda v: isinstance(v, dict) and all(map(ok, v.values()))
rank_ok = lambda v: is_int(v) and v >= 1
TYPES = {"r": rank_ok, "lora_alpha": is_num, "bias": one_of("none", "all", "lora_only"), "rank_pattern": pattern_of(rank_ok),
         "alpha_pattern": pattern_of(is_num), "target_modules": lambda v: is_str(v) or strs(v), "modules_to_save": strs, "task_type": is_str,
         "init_lora_weights": lambda v: is_bool(v) or is_str(v), "base_model_name_or_path": is_str,
         **dict.fromkeys(["use_rslora", "lora_bias", "fan_in_fan_out"], is_bool)}
REFUSED = ["use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens", "layer_replication", "target_parameters",
           "trainable_token_indices", "megatron_config", "velora_config", "monteclora_config", "enable_lora"]
HARMLESS = set("""auto_mapping corda_config ensure_weight_tying eva_config exclude_modules inference_mode layers_pattern layers_to_transform
    loftq_config lora_dropout lora_ga_config megatron_core merge_weights peft_type peft_version qalora_group_size revision runtime_config""".split())
TASKS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)(?:\.([^.]+))?\.(weight|bias)|(.+)\.(lora_embedding_[AB])(?:\.([^.]+))?")
FOREIGN = re.compile(r"(lora_unet_|lora_te\d?_|lora_transformer_|lycoris_).*|.*\.lora_(down|up|mid)\.weight|.*lora\.(down|up)\.weight|.*\.lora_[ab](\.weight)?"
                     r"|(unet|text_encoder|text_encoder_2)\..*\.lora_[AB]\.weight|transformer\.(single_)?transformer_blocks\..*\.lora_[AB]\.weight")
OTHER_METHODS = tuple("""lora_magnitude_vector lora_diag lora_E ranknum lora_velora_ lora_monteclora_ trainable_tokens_ hada_ lokr_ oft_ boft_ ia3_l
    vera_ pvera_ randlora_ vblora_ fourierft_ prompt_""".split())


def resolve(patterns, module, default):
    for key, value in (patterns or {}).items():  # file order
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return (patterns or {}).get(module, default)


def read_config(data, warn):
    need(len(data) <= 1 << 20, "P-005")
    config = document(data, "P-001", "P-002")
    need("peft_type" in config or not {"lora_parameters", "fine_tune_type"} & set(config), "P-018")
    need(config.get("peft_type") == "LORA", "P-003")
    need(config.get("r") is not None, "P-004", "r")
    for key, value in config.items():
        need(key not in TYPES or TYPES[key](value) or value is None and key != "bias", "P-004", key)
        warn += ["P-015"] if key not in TYPES and key not in REFUSED and key not in HARMLESS else []
    need(max([config["r"], *(config.get("rank_pattern") or {}).values()]) <= 4096, "P-005")
    need(all(config.get(key) in (None, False, []) for key in REFUSED), "P-006")
    init = config.get("init_lora_weights")
    need(not is_str(init) or init.lower() in ("gaussian", "eva", "orthogonal", "mica"), "P-007")
    for key in [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as e:
            raise Broken("P-008", str(e))
    return config


def peft_parts(file, config, warn):
    """Factor pairs by module, bias updates, and full tensors, from the names alone."""
    pairs, biases, full, adapters, names = {}, {}, {}, set(), list(file.tensors)
    ours = [n.startswith("base_model.model.") for n in names]
    need(not any(FOREIGN.fullmatch(n) for n, our in zip(names, ours) if not our), "P-018")
    weights = sum(n.endswith((".weight", ".bias")) for n in names)
    need(any(ours) or any("lora" in n or "adapter" in n for n in names) or weights * 2 <= len(names), "A-029")
    need(all(ours) or not any(ours), "P-011")
    warn += [] if all(ours) else ["P-011"]
    for name in names:
        path = name.removeprefix("base_model.model.")
        need("." in path, "P-011", name)
        parts, hit = path.split("."), FACTOR.fullmatch(path)
        if hit:
            module, part = hit[1] or hit[5], hit[2] or hit[6]
            need("base_layer" not in module.split("."), "A-010", name)
            adapters.add(hit[3] or hit[7] or "")
            need(hit[4] != "bias" or part == "lora_B" and config.get("lora_bias"), "P-011", name)
            if hit[4] == "bias":
                biases[module] = name
            else:
                pairs.setdefault(module, {})[part] = name
            continue
        need(parts[-1] not in ("lora_A", "lora_B") and not any(p.startswith(OTHER_METHODS) for p in parts[-3:]), "A-010", name)
        own = len(parts) > 2 and parts[-2] == "base_layer" and parts[-1] in ("weight", "bias")
        need(own or parts[-2] not in ("base_layer", "original_module"), "A-010", name)
        full[name] = re.sub(r"\.modules_to_save\.[^.]+\.", ".", path)
    need(len(adapters) <= 1, "P-012", str(adapters))
    return pairs, biases, full


def read_peft(folder, warn):
    weights, config_path = os.path.join(folder, "adapter_model.safetensors"), os.path.join(folder, "adapter_config.json")
    beside = set(os.listdir(folder))
    need(os.path.isfile(weights) or not beside & {"model.safetensors", "model.safetensors.index.json"}, "A-029")
    need(os.path.isfile(weights) or "adapters.safetensors" not in beside, "P-018")
    need(os.path.isfile(weights), "P-019")
    config = read_config(open(config_path, "rb").read(), warn) if os.path.isfile(config_path) else None
    file = File(open(weights, "rb").read())
    manifest = read_container(file, warn) if "loratool.manifest" in file.metadata else None
    need(config is not None or manifest, "P-017")
    scaling = "alpha/sqrt(rank)" if config and config.get("use_rslora") else "alpha/rank"
    stated = lambda module: (resolve(config.get("rank_pattern"), module, config["r"]),
                             resolve(config.get("alpha_pattern"), module, 8 if config.get("lora_alpha") is None else config["lora_alpha"]), scaling)
    if manifest:
        for t in manifest["targets"] if config is not None else []:
            rank, alpha, rule = stated(t["tensor"].removesuffix(".weight"))
            theirs = formula({"rank": rank, "alpha": alpha, "scaling": rule})
            need(t["rank"] == rank and abs(t["scale"] - theirs) <= 1e-12 * abs(t["scale"]), "P-014", t["tensor"])
        return file, manifest
    pairs, biases, full = peft_parts(file, config, warn)
    targets, replacements = [], []
    for module, p in pairs.items():
        embedding = any("embedding" in part for part in p)
        need(len(p) == 2 and len({part[:-1] for part in p}) == 1, "A-001", module)
        a, b = (p["lora_embedding_" + f if embedding else "lora_" + f] for f in "AB")
        sa, sb = file.shape(a), file.shape(b)
        need(not (len(sa) == len(sb) in (3, 4, 5) and sb[2:] == [1] * (len(sb) - 2)), "A-010", module)
        rank, alpha, _ = stated(module)
        targets.append({"tensor": module + ".weight", "a": a, "b": b, "rank": rank, "alpha": alpha, "scaling": scaling})
        if module in biases:
            targets[-1]["bias"] = {"tensor": module + ".bias", "delta": biases[module]}
    need(set(biases) <= set(pairs), "A-001")
    bias, saved = config.get("bias", "none"), (config.get("modules_to_save") or []) + TASKS.get(config.get("task_type"), [])
    for name, tensor in full.items():
        own = re.fullmatch(r"(.*)\.base_layer\.(weight|bias)", tensor)
        tensor = f"{own[1]}.{own[2]}" if own else tensor
        module, _, leaf = tensor.rpartition(".")
        parents = [tensor[:dot.start()] for dot in re.finditer(r"\.", tensor)]
        announced = any(m and parent.endswith(m) for m in saved for parent in parents)
        announced = announced or leaf == "bias" and (bias == "all" or bias == "lora_only" and module in pairs)
        announced = announced or own and leaf == "weight" and module in pairs
        need(announced, "P-011" if re.search(r"(^|\.)lora_", tensor) else "P-013", name)
        replacements.append((tensor, name))
    for t in targets:  # shapes first, then what the config says of them
        a, b = file.shape(t["a"]), file.shape(t["b"])
        need(len(a) == len(b) == 2, "A-004", t["a"])
        need(a[0] == b[1] >= 1, "A-002", t["a"])
        need(a[0] == t["rank"], "P-010", t["a"])
    alphas, selected = config.get("alpha_pattern") or {}, config.get("target_modules")
    for key in [*(config.get("rank_pattern") or {}), *alphas]:
        need(any(m == key or re.match(rf"(.*\.)?({key})$", m) for m in pairs), "P-009", key)
    for module in pairs:
        warn += ["P-009"] if len({v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", module)}) > 1 else []
        if selected is not None and str(selected).lower() != "all-linear":
            listed = re.fullmatch(selected, module) if is_str(selected) else any(("." + module).endswith("." + n) for n in selected)
            warn += [] if listed else ["P-016"]
    check_adapter(file, targets, replacements, warn)
    check_finite(file)
    return file, None


# --- checkpoints: checkpoint.md ----------------------------------------------------------------------------------------------
def model_config(folder, warn):
    """config.json: nothing of it is needed here, but what is wrong with it is reported."""
    path = os.path.join(folder, "config.json")
    try:
        if os.path.isfile(path):
            config = document(open(path, "rb").read(), "K-015", None)
            parts = [config, config.get("text_config"), config.get("quantization_config")]
            need(not any(getattr(part, "twice", None) for part in parts) and os.path.getsize(path) <= 1 << 20, "K-015")
    except Broken as e:
        warn.append(e.rule)


def read_checkpoint(path, warn):
    model_config(path if os.path.isdir(path) else os.path.dirname(path), warn)
    if os.path.isfile(path):
        return File(open(path, "rb").read(), warn)
    entries = sorted(os.listdir(path)) if os.path.isdir(path) else []
    indices = [e for e in entries if e.endswith(".safetensors.index.json")]
    adapter = [e for e in entries if e == "adapter_config.json" or e.startswith("adapter_model.")]
    plain = [e for e in entries if e.endswith(".safetensors") and e not in adapter and e[0] != "."]
    if not indices:
        use = [n for n in ("model.safetensors", "diffusion_pytorch_model.safetensors") if n in plain][:1] or plain
        need(use or not adapter, "A-029")
        need(len(use) == 1 and not re.search(r"-of-0*([2-9]|[1-9]\d+)\.safetensors$", use[0]), "K-001", str(plain))
        warn += ["K-011"] if len(plain) > 1 else []
        need(os.path.isfile(os.path.join(path, use[0])), "K-009")
        return File(open(os.path.join(path, use[0]), "rb").read(), warn)
    need(len(indices) == 1, "K-001", str(indices))
    data = open(os.path.join(path, indices[0]), "rb").read()
    need(len(data) <= 100_000_000, "K-013")
    index = document(data, "K-002", "K-005")
    table = index.get("weight_map")
    need(isinstance(table, dict) and table and all(map(is_str, table.values())), "K-002")
    for shard in table.values():
        need(shard not in ("", ".", "..") and not re.search(r"[/\\:\0-\x1f\x7f]", shard), "K-003", shard)
    shards = sorted(set(table.values()))
    need(len({s.lower() for s in shards}) == len(shards), "K-014")
    files = {}
    for shard in shards:
        need(os.path.lexists(os.path.join(path, shard)), "K-004", shard)
        need(os.path.isfile(os.path.join(path, shard)), "K-009", shard)
        files[shard] = File(open(os.path.join(path, shard), "rb").read(), warn)
    need(all(name in files[shard].tensors for name, shard in table.items()), "K-006")
    held = [name for file in files.values() for name in file.tensors]
    need(sorted(held) == sorted(table), "K-007")
    metadata = index.get("metadata")
    total, size = metadata.get("total_size", "absent") if isinstance(metadata, dict) else "absent", sum(len(f.body) for f in files.values())
    warn += ["K-010"] if total != "absent" and not (is_int(total) and total == size) else []
    warn += ["K-011"] if set(plain) - set(shards) else []
    return None


# --- main --------------------------------------------------------------------------------------------------------------------
def read(path, kind=None):
    """(outcome, rule or None, warnings, file, manifest)"""
    warn, file, m = [], None, None
    try:
        if kind is None and os.path.isdir(path):
            kind = "peft" if any(os.path.exists(os.path.join(path, f"adapter_{n}")) for n in ("config.json", "model.safetensors")) else "checkpoint"
        if kind == "checkpoint":
            file = read_checkpoint(path, warn)
        elif kind == "peft":
            file, m = read_peft(path, warn)
        else:
            file = File(open(path, "rb").read())
            m = read_container(file, warn) if kind == "container" or kind is None and "loratool.manifest" in file.metadata else None
    except Broken as e:
        return e.outcome, e.rule, warn, file, m
    except OSError:
        return "io", "E-001", warn, file, m
    return "accept", None, sorted(set(warn)), file, m


def main(arguments):
    if len(arguments) == 1:
        outcome, rule, warn, _, _ = read(arguments[0])
        print(json.dumps({"outcome": outcome, "rule": rule, "warns": warn}))
        return outcome != "accept"
    folder = arguments[1]
    vectors, wrong = json.load(open(os.path.join(folder, "manifest.json")))["vectors"], 0
    for v in vectors:
        outcome, rule, warn, file, m = read(os.path.join(folder, v["path"]), v["kind"])
        found = {"expect": outcome, "rules": v["rules"] if outcome == "accept" else [rule], "warns": warn if outcome == "accept" else [],
                 "content": m and root({n: digest(d, s, file.data(n)) for n, (d, s, _, _) in file.tensors.items()})}
        differs = {k: x for k, x in found.items() if x != v.get(k, [] if k == "warns" else x if outcome != "accept" else None)}
        for tensor, place, value, tolerance in v.get("delta", []) if m else []:
            if abs(delta(file, m, tensor, place) - value) > tolerance:
                differs[f"{tensor}{place}"] = delta(file, m, tensor, place)
        if differs:
            wrong += 1
            print(f"{v['path']}: expected {v['expect']} {v['rules']}, found {differs}")
    print(f"{len(vectors) - wrong} of {len(vectors)} vectors agree")
    return wrong > 0


if __name__ == "__main__":
    if len(sys.argv) == 2 or len(sys.argv) == 3 and sys.argv[1] == "--vectors":
        sys.exit(main(sys.argv[1:]))
    sys.exit(__doc__)
