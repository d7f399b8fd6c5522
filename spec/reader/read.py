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
KINDS = {"linear": 2, "linear_transposed": 2, "embedding": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5, "experts": 3, "flat": 2}
IMPLEMENTED = {*KINDS, "dora", "lora_bias", "replacements", "rescalings", "replication", "residual", "rows", "shared"} - {"linear"}
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


def layer(kind, a, b, axes="out_in"):
    """Ranks of A and B, outputs, inputs, and the shape of W, from the shapes of A and B; None if they are not those of the kind."""
    if not len(a) == len(b) == KINDS[kind] or kind == "experts" and a[0] != b[0] or kind[:4] == "conv" and set(b[2:]) != {1}:
        return None
    stack = a[:1] if kind == "experts" else []
    (rank, *inner), (out, columns) = a[len(stack):], b[len(stack):len(stack) + 2]
    straight = kind in ("linear", "flat") or kind[:4] == "conv" or kind == "experts" and axes == "out_in"
    return rank, columns, out, math.prod(inner), stack + ([out, *inner] if straight else [*inner, out])


def check_adapter(file, targets, replacements, warn, rows=(), rescalings=()):
    """`targets` as in the manifest, but with the shapes of the factors in `A` and `B`; `replacements` and `rows` as in the manifest."""
    for name in file.tensors:
        need(file.tensors[name][0] in (*FLOATS, "BF16"), "A-005", name)
    for t in targets:
        found, where = layer(t["kind"], t["A"], t["B"], t.get("axes")), t["tensor"]
        need(found and all(t["A"][1:]) and t["B"][0] and (t["kind"] != "experts" or t["B"][1]), "A-004", where)
        rank, columns, out, inner, _ = found
        need(rank == columns >= 1 and rank == t["rank"], "A-002", where)
        need(rank <= 4096, "A-003", where)
        warn += ["A-003"] if rank > min(inner, out) else []
        need(math.isfinite(t["alpha"]) and t["alpha"] != 0 and formula(t) != 0, "A-006", where)
        need(t["alpha"] > 0, "A-007", where)
        warn += ["A-007"] if formula(t) > 1000 else []
        if "magnitude" in t:
            need(t["kind"] != "experts", "A-010", where)
            shape = file.shape(t["magnitude"])
            need(math.prod(shape) == out and out in shape, "A-004", t["magnitude"])
        need("bias" not in t or file.shape(t["bias"]["delta"]) == [out], "A-004", where)
    for r in rows:
        shape = file.shape(r["with"])
        need(len(shape) >= 2 and shape[0] == len(r["rows"]) > 0, "A-004", r["with"])
        need(len(set(r["rows"])) == len(r["rows"]), "A-009", r["with"])
    updated = [t["tensor"] for t in [*targets, *rescalings]] + [t["bias"]["tensor"] for t in targets if "bias" in t]
    for replaced in (replacements, rows):
        need(len({r["tensor"] for r in replaced}) == len(replaced), "A-009")
    need(len(updated) == len(set(updated)), "A-009")
    need(updated or replacements or rows, "A-012")


def check_finite(file):
    for name in file.tensors:
        need(all(map(math.isfinite, file.values(name))), "A-008", name)


# --- the container: C-030 to C-042 -------------------------------------------------------------------------------------------
uints = lambda v: isinstance(v, list) and all(is_uint(d) and d < 2**64 for d in v)
pairs_of = lambda v: isinstance(v, list) and all(uints(p) and len(p) == 2 for p in v)
is_bool = lambda v: isinstance(v, bool)
TARGET = {"tensor": is_str, "kind": one_of(*KINDS), "shape": uints,
          "a": is_str, "b": is_str, "rank": is_uint, "alpha": is_num, "scaling": one_of("alpha/rank", "alpha/sqrt(rank)"), "scale": is_num}
falling = lambda v: isinstance(v, list) and all(is_num(x) and x >= 0 for x in v) and all(x >= y for x, y in zip(v, v[1:]))
OBJECT, LIST, NULL = (lambda v: isinstance(v, dict)), (lambda v: isinstance(v, list)), (lambda v: v is None or is_str(v))
MANIFEST = {"container": is_str, "required": strs, "optional": strs, "base": OBJECT, "targets": LIST, "replacements": LIST, "digests": OBJECT,
            "content": is_str, "lineage": lambda v: True}
LISTS = {  # the members of their objects, and which of these may be left out
    "targets": (TARGET, {"bias": OBJECT, "magnitude": is_str, "singular_values": falling}),
    "replacements": ({"tensor": is_str, "with": is_str}, {"shared": is_bool}),
    "rows": ({"tensor": is_str, "rows": uints, "with": is_str}, {}),
    "rescalings": ({"tensor": is_str, "axis": one_of("output", "input"), "transposed": is_bool, "if_there": is_bool, "by": is_str}, {})}
REMOVED = one_of("leading_columns", "leading_components", "trailing_components", "unknown")


def members(value, listed, optional={}, rule="C-033"):
    need(isinstance(value, dict), rule)
    known = {k: v for k, v in value.items() if not k.startswith("x-")}
    need(set(listed) <= set(known) <= set(listed) | set(optional), rule, str(set(known) ^ set(listed)))
    for key, v in known.items():
        need({**listed, **optional}[key](v), rule, key)


def read_container(file, warn):
    need("loratool.manifest" in file.metadata, "C-030")
    m = document(file.metadata["loratool.manifest"], "C-030", "C-030")
    need(file.metadata.get("format") == "pt", "C-041")
    version = m.get("container")
    need(is_str(version), "C-033")
    need(re.fullmatch(r"1\.(0|[1-9][0-9]*)", version), "C-031", version)
    need(strs(m.get("required")), "C-033")
    need(set(m["required"]) <= IMPLEMENTED, "C-032", str(m["required"]))
    members(m, MANIFEST, {"rows": LIST, "rescalings": LIST, "replication": pairs_of, "residual": OBJECT, "origin": OBJECT})
    members(m["base"], {"name": NULL, "structure": NULL, "targets": NULL})
    m = {"rows": [], "rescalings": [], **m}
    for key, (listed, optional) in LISTS.items():
        for entry in m[key]:
            stack = key == "targets" and isinstance(entry, dict) and entry.get("kind") == "experts"
            members(entry, {**listed, "axes": one_of("in_out", "out_in")} if stack else listed, optional)
            need(not stack or not entry.get("singular_values"), "C-033", "singular_values")
            if "bias" in entry:
                members(entry["bias"], {"tensor": is_str, "delta": is_str})
    if "residual" in m:
        members(m["residual"], {"why": is_str, "removed": REMOVED})
    if "origin" in m:
        members(m["origin"], {"dialect": is_str, "config": OBJECT})
    need(all(map(is_str, m["digests"].values())), "C-033")
    used = {t["kind"] for t in m["targets"]} - {"linear"} | {key for key in ("replacements", "rows", "rescalings", "replication", "residual") if m.get(key)}
    used |= {f for t in m["targets"] for f, key in (("lora_bias", "bias"), ("dora", "magnitude")) if key in t}
    used |= {"shared" for r in m["replacements"] if r.get("shared")}
    need(used <= set(m["required"]), "C-033", str(used))
    need(isinstance(m["lineage"], list), "C-042")
    for record in m["lineage"]:
        members(record, {"op": is_str, "tool": is_str, "inputs": LIST, "parameters": OBJECT}, rule="C-042")
        for i in record["inputs"]:
            members(i, {"role": is_str, "dialect": is_str, "content": is_hex}, rule="C-042")
    need(all(map(is_hex, [m["content"], *m["digests"].values()])), "C-039")
    need(all(v is None or is_hex(v) for v in (m["base"]["structure"], m["base"]["targets"])), "C-039")
    named = [n for t in m["targets"] for n in (t["a"], t["b"], t.get("bias", {}).get("delta"), t.get("magnitude")) if n is not None]
    named += [r["with"] for r in m["replacements"] + m["rows"]] + list({r["by"] for r in m["rescalings"]})
    need(sorted(named) == sorted(file.tensors) == sorted(m["digests"]), "C-034")
    for t in m["targets"]:
        t["A"], t["B"] = file.shape(t["a"]), file.shape(t["b"])
        found = layer(t["kind"], t["A"], t["B"], t.get("axes"))
        need(found and found[0] == found[1] == t["rank"] and found[4] == t["shape"], "C-035", t["tensor"])
        need(len(t.get("singular_values") or [0] * t["rank"]) == t["rank"], "C-035", t["tensor"])
        need(not t["rank"] or abs(t["scale"] - formula(t)) <= 1e-12 * abs(formula(t)), "C-036", t["tensor"])
    need(m["content"] == root(m["digests"]), "C-038")
    check_adapter(file, m["targets"], m["replacements"], warn, m["rows"], m["rescalings"])
    for name, (dtype, shape, _, _) in file.tensors.items():
        need(m["digests"][name] == digest(dtype, shape, file.data(name)), "C-037", name)
    check_finite(file)
    return m


def delta(file, m, tensor, place):
    """One element of the update, before magnitudes; `place` is that of the base tensor, of a flat one (out, everything else)."""
    t = next(t for t in m["targets"] if t["tensor"] == tensor)
    rank, _, outs, inner, shape = layer(t["kind"], t["A"], t["B"], t.get("axes"))
    expert, place = (place[0], place[1:]) if t["kind"] == "experts" else (0, place)
    if t["kind"] in ("linear_transposed", "embedding") or t.get("axes") == "in_out":
        place = place[::-1]
    out, column = place[0], 0
    for size, at in zip(shape[1:], place[1:]):  # of a matrix, the second index alone
        column = column * size + at
    a, b, total = file.values(t["a"])[expert * rank * inner:], file.values(t["b"])[expert * outs * rank:], 0.0
    for k in range(rank):
        total += b[out * rank + k] * a[k * inner + column]
    return formula(t) * total


# --- PEFT: mapping/peft.md ---------------------------------------------------------------------------------------------------
pattern_of = lambda ok: lambda v: isinstance(v, dict) and all(map(ok, v.values()))
rank_ok = lambda v: is_int(v) and v >= 1
blocks = lambda v: v is False or isinstance(v, dict) and rank_ok(v.get("nblocks")) and all(strs(v.get("target_modules_bd_" + f) or []) for f in "ab")
tokens = lambda v: uints(v) or pattern_of(uints)(v)
TYPES = {"r": rank_ok, "init_r": rank_ok, "lora_alpha": is_num, "alpha": is_num, "bias": one_of("none", "all", "lora_only"),
         "rank_pattern": pattern_of(rank_ok), "alpha_pattern": pattern_of(is_num), "target_modules": lambda v: is_str(v) or strs(v),
         "init_lora_weights": lambda v: is_bool(v) or is_str(v), "use_bdlora": blocks, "layer_replication": pairs_of, "trainable_token_indices": tokens, "token_indices": tokens,
         **dict.fromkeys(["task_type", "base_model_name_or_path", "peft_version"], is_str),
         **dict.fromkeys(["modules_to_save", "target_parameters", "feedforward_modules"], strs),
         **dict.fromkeys(["use_rslora", "lora_bias", "fan_in_fan_out", "use_dora", "use_qalora", "ensure_weight_tying"], is_bool)}
REFUSED = ["arrow_config", "alora_invocation_tokens", "megatron_config", "enable_lora"]
HARMLESS = set("""auto_mapping beta1 beta2 corda_config d_initial decompose_both decompose_factor deltaT eva_config exclude_modules inference_mode
    init_ia3_weights init_weights kasa_config layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core merge_weights
    module_dropout monteclora_config orth_reg_weight peft_type projection_prng_key qalora_group_size rank_dropout rank_dropout_scale revision
    runtime_config save_projection target_r tfinal tinit total_step use_effective_conv2d velora_config vera_dropout""".split())
METHODS = {"LORA": "", "TRAINABLE_TOKENS": "", "ADALORA": "lora_A lora_B lora_E ranknum", "IA3": "ia3_l", "VERA": "vera_A vera_B vera_lambda_b vera_lambda_d",
           "LOHA": "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2", "LOKR": "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"}
TASKS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
ORDERS = ["gate_up_proj down_proj", "gate_proj up_proj down_proj", "w1 w2 w3", "w1 v1 w2", "input_linear output_linear"]
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)(?:\.([^.]+))?\.(weight|bias)|(.+)\.(lora_embedding_[AB])(?:\.([^.]+))?")
BESIDE = re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.weight|(?:\.([^.]+))?(?:\.weight)?)|(.+)\.(lora_diag)(?:\.([^.]+))?"
                    r"|(.+?)(?:\.token_adapter)?\.(trainable_tokens_delta)(?:\.([^.]+))?")
FOREIGN = re.compile(r"(lora_unet_|lora_te\d?_|lora_transformer_|lycoris_).*|.*\.lora_(down|up|mid)\.weight|.*lora\.(down|up)\.weight|.*\.lora_[ab](\.weight)?"
                     r"|(unet|text_encoder|text_encoder_2)\..*\.lora_[AB]\.weight|transformer\.(single_)?transformer_blocks\..*\.lora_[AB]\.weight")
HEADS = ["lm_head", "embed_out"]
TRAINING = ("lora_velora_", "lora_monteclora_")
OTHER_METHODS = tuple("""lora_E ranknum trainable_tokens_original hada_ lokr_ oft_ boft_ ia3_l vera_ pvera_ randlora_ vblora_ fourierft_ prompt_""".split())
ends_with = lambda path, names: any(("." + path).endswith("." + name) for name in names)
is_embedding = lambda tensor: re.fullmatch(r"(.*\.)?(embed_in|embed_out|embed_tokens|lm_head|shared|tok_embeddings|word_embeddings|wte)\.weight", tensor)

def resolve(patterns, module, default):
    for key, value in (patterns or {}).items():  # file order
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return (patterns or {}).get(module, default)


def read_config(data, warn):
    need(len(data) <= 1 << 20, "P-005")
    config = document(data, "P-001", "P-002")
    need("peft_type" in config or not {"lora_parameters", "fine_tune_type"} & set(config), "P-018")
    method = config.get("peft_type")
    need(is_str(method) and method in METHODS, "P-003")
    if method == "ADALORA":
        config["rank_pattern"] = None  # masks, which say which ranks are in the file
    ranks = {"ADALORA": ["init_r"], "IA3": [], "TRAINABLE_TOKENS": []}.get(method, ["r"]) + ["qalora_group_size"] * (config.get("use_qalora") is True)
    need(all(rank_ok(config.get(key)) for key in ranks), "P-004", str(ranks))
    other = {"lora_alpha" if method in ("LOHA", "LOKR") else "alpha", "trainable_token_indices" if method == "TRAINABLE_TOKENS" else "token_indices",
             *["feedforward_modules"] * (method != "IA3")}  # fields of other methods
    for key, value in config.items():
        need(key not in TYPES or TYPES[key](value) or value is None and key != "bias", "P-004", key)
        warn += ["P-015"] if key in other or key not in TYPES and key not in REFUSED and key not in HARMLESS else []
    need(max([0, *(config[key] for key in ranks), *(config.get("rank_pattern") or {}).values()]) <= 4096, "P-005")
    need(all(config.get(key) in (None, False, []) for key in REFUSED), "P-006")
    for key in [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as e:
            raise Broken("P-008", str(e))
    return config


def peft_parts(file, config, warn):
    """Tensors by module and part, bare modules' rows, full tensors, and the tensors of a method that is not LoRA, from the names alone."""
    pairs, rows, full, made, adapters, names = {}, {}, {}, {}, set(), list(file.tensors)
    parts_of_method = METHODS[config["peft_type"]].split()
    for name in names:
        parts = re.sub(r"^(base_model\.model\.)*(base_model\.)?", "", name).split(".")
        at = next((i for i in (-1, -2) if len(parts) >= -i and parts[i] in parts_of_method), None)
        if at:
            made.setdefault(".".join(parts[:at]), {})[parts[at]] = name
    names = [n for n in names if not any(n in parts.values() for parts in made.values())]
    ours = [n.startswith("base_model.model.") for n in names]
    need(all(ours) or not any(ours), "P-011")
    warn += [] if all(ours) else ["P-011"]
    for name in names:
        path = name.removeprefix("base_model.model.")
        need("." in path, "P-011", name)
        parts, hit, beside = path.split("."), FACTOR.fullmatch(path), BESIDE.fullmatch(path)
        copy = re.fullmatch(r"(.*)\.(modules_to_save|original_module)\.weight", name)
        if any(p.startswith(TRAINING) for p in parts[-3:]) or copy and copy[1] + ".weight" in names:  # left out
            warn.append("P-011")
            del file.tensors[name]
        elif hit or beside:
            groups = hit.groups() if hit else beside.groups()
            module, part, adapter = next(groups[i:i + 3] for i in ((0, 4) if hit else (0, 3, 6)) if groups[i])
            adapters.add(adapter or "")
            need(config["peft_type"] == "LORA" or part == "trainable_tokens_delta", "P-011", name)
            part = "bias" if hit and hit[4] == "bias" else part
            need(part != "bias" or hit[2] == "lora_B" and config.get("lora_bias"), "P-011", name)
            if part == "trainable_tokens_delta":
                rows[module] = name
            else:
                pairs.setdefault(module, {})[part] = name
        else:
            need(parts[-1] not in ("lora_A", "lora_B") and not any(p.startswith(OTHER_METHODS) for p in parts[-3:]), "A-010", name)
            own = len(parts) > 2 and parts[-2] == "base_layer" and parts[-1] in ("weight", "bias")
            need(own or not {"base_layer", "original_module"} & set(parts), "A-010", name)
            path = re.sub(r"\.token_adapter\.base_layer\.weight$", ".base_layer.weight", path)
            full[name] = re.sub(r"\.modules_to_save\.[^.]+\.", ".", path)
    need(len(adapters) <= 1, "P-012", str(adapters))
    return pairs, rows, full, made


def places(paths, config):
    """Base tensor of each module with factors, the name that patterns are matched against, and whether it is a bare parameter."""
    found, stacks = {}, {}
    for path in paths:
        module, attention = re.sub(r"(\.base_layer)+$", "", path), path.removesuffix(".base_layer.out_proj")
        listed = {e.split(".")[-1] for e in config.get("target_parameters") or [] if ends_with(f"{module}.{e.split('.')[-1]}", [e])}
        if attention != path:
            found[path] = attention + ".out_proj.weight", attention, False
        elif path + ".base_layer.out_proj" in paths:
            found[path] = path + ".in_proj_weight", path, False
        elif module == path and not listed:
            need(".base_layer" not in path, "A-010", path)
            found[path] = path + ".weight", path, False
        else:
            stacks.setdefault((module, frozenset(listed)), []).append(path)
    for (module, listed), inner in stacks.items():  # the first one registered lies deepest
        order = next((o.split() for o in ORDERS if listed <= set(o.split())), sorted(listed) if len(listed) == 1 else [])
        order = [parameter for parameter in order if parameter in listed]
        need(len(order) == len(inner), "A-010", module)
        for path, parameter in zip(sorted(inner, key=len, reverse=True), order):
            found[path] = f"{module}.{parameter}", f"{module}.{parameter}", True
    return found


def half(parts, shape, stem, core):
    """Rows, columns and rank of L times R, of which a LoHa and a LoKr have two; and the tensors."""
    whole, a, b, t = (parts.get(n) for n in (stem, stem + "_a", stem + "_b", core))
    need(bool(whole) != bool(a and b) and not (whole and (a or b or t)), "A-001", stem)
    if whole:
        rows, cols = shape(whole)[0], math.prod(shape(whole)[1:])
        return rows, cols, min(rows, cols), [whole]
    (x, y), (z, cols) = shape(a), shape(b)
    need((y == z) if not t else shape(t)[:2] == [x, z], "A-001", stem)
    return (y, cols * math.prod(shape(t)[2:]), x, [a, b, t]) if t else (x, cols, y, [a, b])


def other_methods(file, config, made, scale_of, warn):
    """Targets and rescalings of AdaLoRA, LoHa, LoKr, VeRA and IA3: mapping/peft.md, 3.3."""
    method, shape, targets, rescalings = config["peft_type"], file.shape, [], []
    def target(module, kind, rank, inner, out, scale):
        targets.append({"tensor": module + ".weight", "kind": kind, "A": [rank, inner], "B": [out, rank], "rank": rank, "alpha": scale * rank,
                        "scaling": "alpha/rank"})
    common = made.pop("", {}) if method == "VERA" else {}
    if method == "VERA" and made:
        need({"vera_A", "vera_B"} <= set(common), "A-010")
    for module, parts in made.items():
        if method == "ADALORA":
            need({"lora_A", "lora_B", "lora_E"} <= set(parts), "A-001", module)
            a, b, e = (shape(parts["lora_" + f]) for f in "ABE")
            need(len(a) == len(b) == 2 and math.prod(e) == a[0] == b[1], "A-001", module)
            warn += [] if a[0] else ["A-002"]
            if a[0]:
                target(module, "linear", a[0], a[1], b[0], (8 if config.get("lora_alpha") is None else config["lora_alpha"]) / (config["init_r"] + 1e-5))
        elif method == "VERA":
            need({"vera_lambda_b", "vera_lambda_d"} <= set(parts), "A-001", module)
            a, b, out = shape(common["vera_A"]), shape(common["vera_B"]), math.prod(shape(parts["vera_lambda_b"]))
            need(len(a) == len(b) == 2 and math.prod(shape(parts["vera_lambda_d"])) == a[0] == b[1] and out <= b[0], "A-001", module)
            target(module, "linear", a[0], a[1], out, 1.0)
        elif method == "IA3":
            forward = module.endswith(tuple(config.get("feedforward_modules") or []))
            rescalings += [{"tensor": module + "." + p, "by": parts["ia3_l"]} for p in (["weight"] if forward else ["weight", "bias"])]
        else:
            hadamard = method == "LOHA"
            x, y = (half(parts, shape, f"{'hada' if hadamard else 'lokr'}_w{i}", f"hada_t{i}" if hadamard else "lokr_t2" * (i == 2)) for i in (1, 2))
            need(hadamard or len(y[3]) > 1 or len(shape(y[3][0])) != 3, "A-010", module)
            need(len(x[3] + y[3]) == len(parts) and (not hadamard or x[:2] == y[:2]), "A-001", module)
            rows, cols = x[:2] if hadamard else (x[0] * y[0], x[1] * y[1])
            target(module, "flat", x[2] * y[2], cols, rows, scale_of(module))
    return targets, rescalings


def variant(path, a, b, diagonal, config):
    """The shapes of A and B where BD-LoRA, QALoRA or KaSA stores them in another form."""
    need(bool(diagonal) == (config.get("kasa_config") not in (None, False, [])), "A-001", path)
    bd, group = config.get("use_bdlora"), config.get("qalora_group_size") if config.get("use_qalora") else None
    need(not (bd or group or diagonal) or len(a) == len(b) == 2, "A-004", path)
    if bd and any(part in path for part in bd.get("target_modules_bd_a") or []):
        need(a[0] % bd["nblocks"] == 0, "A-004", path)
        a = [a[0], a[1] * bd["nblocks"]]
    if bd and any(part in path for part in bd.get("target_modules_bd_b") or []):
        need(b[0] % bd["nblocks"] == 0, "A-004", path)
        b = [b[0], b[1] * bd["nblocks"]]
    need(not diagonal or diagonal == [b[1]], "A-004", path)
    return ([a[0], a[1] * group] if group else a), b


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
    alpha = config and config.get("alpha" if config["peft_type"] in ("LOHA", "LOKR") else "lora_alpha")
    stated = lambda module: {"rank": resolve(config.get("rank_pattern"), module, config.get("r", 1)), "scaling": scaling,
                             "alpha": resolve(config.get("alpha_pattern"), module, 8 if alpha is None else alpha)}
    if manifest:
        for t in manifest["targets"] if config is not None else []:
            theirs = stated(t["tensor"].removesuffix(".weight"))
            need(t["rank"] == theirs["rank"] and abs(t["scale"] - formula(theirs)) <= 1e-12 * abs(t["scale"]), "P-014", t["tensor"])
        return file, manifest
    names = list(file.tensors)
    foreign = [n for n in names if not n.startswith("base_model.model.")]
    need(not any(map(FOREIGN.fullmatch, foreign)), "P-018")
    known = any("lora" in n or "adapter" in n or "ia3_l" in n or "vera_" in n or "hada_" in n or "lokr_" in n for n in names)
    need(foreign != names or known or sum(n.endswith((".weight", ".bias")) for n in names) * 2 <= len(names), "A-029")
    pairs, rows_of, full, made = peft_parts(file, config, warn)
    targets, replacements, rows = [], [], []
    for module, p in pairs.items():
        embedding = any("embedding" in part for part in p)
        a, b = (p.get("lora_embedding_" + f if embedding else "lora_" + f) for f in "AB")
        need(a and b and not (embedding and ("lora_A" in p or "lora_B" in p)), "A-001", module)
    placed = places(list(pairs), config)
    for module, p in pairs.items():
        embedding, (tensor, name, parameter) = "lora_embedding_A" in p, placed[module]
        a, b = (p["lora_embedding_" + f if embedding else "lora_" + f] for f in "AB")
        sa, sb = variant(module, file.shape(a), file.shape(b), p.get("lora_diag") and file.shape(p["lora_diag"]), config)
        t = {"tensor": tensor, "A": sa, "B": sb, **stated(name), "kind": "embedding" if embedding else f"conv{len(sa) - 2}d" if 3 <= len(sa) <= 5 else "linear"}
        need(len(sa) <= 5, "A-004", a)
        count = sa[0] // t["rank"]
        if parameter and len(sa) == len(sb) == 2 and count > 1 and sa[0] == sb[1] == count * t["rank"]:
            t.update(kind="experts", A=[count, t["rank"], sa[1]], B=[count, sb[0], t["rank"]])
            need(sa[1] != sb[0] or not (config.get("peft_version") or "").startswith("0.19.0"), "A-024", tensor)
        if t["kind"][:4] == "conv" and len(sa) == len(sb) and sb[1] and sa[0] != sb[1]:
            need(sa[0] % sb[1], "A-010", module)
        need(layer(t["kind"], t["A"], t["B"]), "A-004", a)
        need(t["kind"] == "experts" or sa[0] == sb[1] >= 1, "A-002", a)
        need(t["kind"] == "experts" or sa[0] == t["rank"], "P-010", a)
        need("bias" in p or embedding or not config.get("lora_bias"), "A-001", module)
        need("lora_magnitude_vector" not in p or config.get("use_dora"), "P-011", module)
        need("lora_magnitude_vector" in p or not config.get("use_dora"), "A-001", module)
        bias = tensor.removesuffix("weight") + "bias" if tensor.endswith(".weight") else tensor.replace("in_proj_weight", "in_proj_bias")
        t.update({"bias": {"tensor": bias, "delta": p["bias"]}} if "bias" in p else {})
        t.update({"magnitude": p["lora_magnitude_vector"]} if "lora_magnitude_vector" in p else {})
        targets.append(t)
    more, rescalings = other_methods(file, config, made, lambda module: formula(stated(module)), warn)
    bias, saved = config.get("bias", "none"), (config.get("modules_to_save") or []) + TASKS.get(config.get("task_type"), [])
    for name, tensor in full.items():
        own = re.fullmatch(r"(.*)\.base_layer\.(weight|bias)", tensor)
        tensor = f"{own[1]}.{own[2]}" if own else tensor
        module, _, leaf = tensor.rpartition(".")
        parents = [tensor[:dot.start()] for dot in re.finditer(r"\.", tensor)]
        announced = any(m and parent.endswith(m) for m in saved for parent in parents) or is_embedding(tensor)
        announced = announced or leaf == "bias" and (bias == "all" or bias == "lora_only" and module in pairs)
        announced = announced or own and leaf == "weight" and (module in pairs or module in rows_of)
        need(announced, "P-011" if re.search(r"(^|\.)lora_", tensor) else "P-013", name)
        replacements.append({"tensor": tensor, "with": name})
    listed = config.get("token_indices" if config["peft_type"] == "TRAINABLE_TOKENS" else "trainable_token_indices") or {}
    listed = listed if isinstance(listed, dict) else {"": listed}
    values = lambda name: (file.tensors[name][:2], bytes(file.data(name)))
    for module, name in sorted(rows_of.items(), key=lambda item: ends_with(item[0], HEADS)):
        of = next((key for key in listed if not key or ends_with(module, [key])), None)
        if not of and ends_with(module, HEADS) and any(values(name) == values(r["with"]) for r in rows):
            warn.append("P-011")
            continue
        need(of is not None, "P-013", name)
        rows.append({"tensor": module + ".weight", "rows": listed[of], "with": name})
    need(all(any(not key or ends_with(module, [key]) for module in rows_of) for key in listed), "A-001", "rows")
    tied = config.get("ensure_weight_tying") and any(is_embedding(x["tensor"]) for x in targets + replacements)
    need(not tied, "P-006", "ensure_weight_tying")
    alphas, selected = config.get("alpha_pattern") or {}, None if config["peft_type"] in ("IA3", "TRAINABLE_TOKENS") else config.get("target_modules")
    modules = [name for _, name, _ in placed.values()] + [module for module in made if module]
    for key in [*(config.get("rank_pattern") or {}), *alphas]:
        need(any(m == key or re.match(rf"(.*\.)?({key})$", m) for m in modules), "P-009", key)
    for module in modules:
        warn += ["P-009"] if len({v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", module)}) > 1 else []
        if selected is not None and str(selected).lower() != "all-linear" and not any(p and n == module for _, n, p in placed.values()):
            warn += [] if (re.fullmatch(selected, module) if is_str(selected) else ends_with(module, selected)) else ["P-016"]
    check_adapter(file, targets + more, replacements, warn, rows, rescalings)
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
