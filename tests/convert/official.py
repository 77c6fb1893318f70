"""The official release for tests: its golden vectors, random weights in its layout, and an independent oracle.

The oracle is float64, token by token, and never meets our code or our order of channels: it pairs the channels as the
official layout does, and turns the state by -theta dt instead of B and C by phi (mathematics.md, section 2).
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden" / "official"
LAYERS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
MODELS = sorted(path.name for path in GOLDEN.glob("official_lm_*"))
DEFAULTS = {
    "d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1, "rope_fraction": 0.5, "is_mimo": False, "mimo_rank": 4,
    "is_outproj_norm": False, "A_floor": 1e-4, "decay": "heavy_tail",
}  # fmt: skip


def golden_layer(name):
    """(config, tensors) of one vector."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), load_file(path)


def under(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def relative_error(ours, golden):
    return ((ours - golden).norm() / golden.norm()).item()


def sizes(config):
    c = {**DEFAULTS, **config}
    rank = c["mimo_rank"] if c["is_mimo"] else 1
    inner = int(c["expand"] * c["d_model"])
    split = int(c["d_state"] * c["rope_fraction"])
    split -= split % 2
    return c, rank, inner, inner // c["headdim"], split // 2


def random_layer(config, seed=0, dtype=torch.float64):
    """Random weights under the official names, far from their initial values."""
    c, rank, inner, heads, angles = sizes(config)
    n, p, d = c["d_state"], c["headdim"], c["d_model"]
    shapes = {
        "in_proj.weight": (2 * inner + 2 * rank * c["ngroups"] * n + 3 * heads + angles, d), "out_proj.weight": (d, inner),
        "dt_bias": (heads,), "D": (heads,), "B_bias": (heads, rank, n), "C_bias": (heads, rank, n),
        "B_norm.weight": (n,), "C_norm.weight": (n,),
    }  # fmt: skip
    if c["is_mimo"]:
        shapes |= {name: (heads, rank, p) for name in ("mimo_x", "mimo_z", "mimo_o")}
    if c["is_outproj_norm"]:
        shapes["norm.weight"] = (inner,)
    random = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}
    weights["in_proj.weight"] *= 1.5 / math.sqrt(d)
    weights["out_proj.weight"] /= math.sqrt(inner)
    weights["dt_bias"] -= 1
    return {name: value.to(dtype) for name, value in weights.items()}


def random_model(config, seed=0, dtype=torch.float64):
    """Random weights of a whole model under the official names."""
    random = torch.Generator().manual_seed(seed)
    d, multiple = config["d_model"], config["pad_vocab_size_multiple"]

    def draw(*shape, scale=1.0, shift=0.0):
        return (scale * torch.randn(shape, generator=random, dtype=torch.float64) + shift).to(dtype)

    vocabulary = -(-config["vocab_size"] // multiple) * multiple
    weights = {"backbone.embedding.weight": draw(vocabulary, d), "backbone.norm_f.weight": draw(d, scale=0.1, shift=1)}
    tied = weights["backbone.embedding.weight"]
    weights["lm_head.weight"] = tied if config["tie_embeddings"] else draw(vocabulary, d)
    inner = -(-config["d_intermediate"] // 128) * 128
    for i in range(config["n_layer"]):
        prefix = f"backbone.layers.{i}."
        weights[prefix + "norm.weight"] = draw(d, scale=0.1, shift=1)
        if i in config.get("attn_layer_idx", []):
            attn = config["attn_cfg"]
            heads, kv = attn["num_heads"], attn.get("num_heads_kv") or attn["num_heads"]
            e = attn.get("head_dim") or d // heads
            mixer = {
                "in_proj.weight": draw((heads + 2 * kv) * e, d, scale=d**-0.5),
                "out_proj.weight": draw(d, heads * e, scale=(heads * e) ** -0.5),
            }
            if attn.get("qkv_proj_bias", True):
                mixer["in_proj.bias"] = draw((heads + 2 * kv) * e)
            if attn.get("out_proj_bias", True):
                mixer["out_proj.bias"] = draw(d)
        else:
            mixer = random_layer(layer_config(config), seed=100 + i, dtype=dtype)
        weights |= {f"{prefix}mixer.{name}": value for name, value in mixer.items()}
        if inner:
            weights[prefix + "norm2.weight"] = draw(d, scale=0.1, shift=1)
            weights[prefix + "mlp.fc1.weight"] = draw(2 * inner, d, scale=d**-0.5)
            weights[prefix + "mlp.fc2.weight"] = draw(d, inner, scale=inner**-0.5)
    return weights


def layer_config(config, decay=None):
    ssm = {name: value for name, value in config["ssm_cfg"].items() if name != "layer"}
    return {**ssm, "d_model": config["d_model"], **({"decay": decay} if decay else {})}


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turn(v, pairs, angle):
    """v [..., n] with channel pair k turned by angle [..., k]."""
    out = v.clone()
    for k, (i, j) in enumerate(pairs):
        cos, sin = angle[..., k].cos(), angle[..., k].sin()
        out[..., i] = v[..., i] * cos - v[..., j] * sin
        out[..., j] = v[..., i] * sin + v[..., j] * cos
    return out


def oracle_layer(config, weights, u):
    """y [b, t, d] of an official layer."""
    c, rank, inner, heads, angles = sizes(config)
    w = {name: value.double() for name, value in weights.items()}
    n, p, g, batch = c["d_state"], c["headdim"], c["ngroups"], u.shape[0]
    pairs = [(i, i + n // 2) if c["is_mimo"] else (2 * i, 2 * i + 1) for i in range(angles)]
    bc = rank * g * n
    row = u.double() @ w["in_proj.weight"].T
    z, x, B, C, dt, A, lam, theta = row.split([inner, inner, bc, bc, heads, heads, heads, angles], dim=-1)
    dt = torch.log1p(torch.exp(dt + w["dt_bias"]))
    A = torch.log1p(torch.exp(A)) if c["decay"] == "softplus" else torch.where(A >= 0, 1 + A, 1 / (1 - A.clamp(max=0)))
    A = -A.clamp(min=c["A_floor"])
    lam, theta = torch.sigmoid(lam), math.pi * torch.tanh(theta)
    group = torch.arange(heads) // (heads // g)
    vectors = []
    for v, name in ((B, "B"), (C, "C")):
        v = rms_norm(v.reshape(batch, -1, rank, g, n), w[f"{name}_norm.weight"])[:, :, :, group]
        vectors.append(v + w[f"{name}_bias"].transpose(0, 1))
    B, C = vectors
    x, z = (v.reshape(batch, -1, 1, heads, p).expand(-1, -1, rank, -1, -1) for v in (x, z))
    if c["is_mimo"]:
        x, z = x * w["mimo_x"].transpose(0, 1), z * w["mimo_z"].transpose(0, 1)
    S, before, outputs = torch.zeros(batch, heads, p, n, dtype=torch.float64), 0, []
    for t in range(u.shape[1]):
        now = torch.einsum("brhp,brhn->bhpn", x[:, t], B[:, t])
        dt_t, lam_t = dt[:, t, :, None, None], lam[:, t, :, None, None]
        angle = -theta[:, t, None, None] * dt_t
        S = turn(S + (1 - lam_t) * dt_t * before, pairs, angle.expand(-1, -1, p, -1))
        S = torch.exp(A[:, t, :, None, None] * dt_t) * S + lam_t * dt_t * now
        y = torch.einsum("bhpn,brhn->brhp", S, C[:, t]) + w["D"][:, None] * x[:, t]
        if c["is_outproj_norm"]:
            y = rms_norm(y, w["norm.weight"].view(heads, p))
        y = y * z[:, t] * torch.sigmoid(z[:, t])
        outputs.append(((y * w["mimo_o"].transpose(0, 1)) if c["is_mimo"] else y).sum(1).reshape(batch, inner))
        before = now
    return torch.stack(outputs, 1) @ w["out_proj.weight"].T


def oracle_attention(attn, weights, u):
    """Attention as the official layout cuts it: [q heads | k heads | v heads], one query at a time."""
    w = {name: value.double() for name, value in weights.items()}
    heads, kv = attn["num_heads"], attn.get("num_heads_kv") or attn["num_heads"]
    e = attn.get("head_dim") or u.shape[-1] // heads
    row = u @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    q = row[..., : heads * e].unflatten(-1, (heads, e))
    k = row[..., heads * e : (heads + kv) * e].unflatten(-1, (kv, e))
    v = row[..., (heads + kv) * e :].unflatten(-1, (kv, e))
    y = torch.zeros_like(q)
    for t in range(u.shape[1]):
        for h in range(heads):
            j = h // (heads // kv)
            scores = torch.einsum("be,bse->bs", q[:, t, h], k[:, : t + 1, j]) / math.sqrt(e)
            y[:, t, h] = torch.einsum("bs,bse->be", F.softmax(scores, -1), v[:, : t + 1, j])
    return y.flatten(-2) @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)


def oracle_model(config, weights, input_ids, decay):
    """Logits of an official model."""
    w = {name: value.double() for name, value in weights.items()}
    h = w["backbone.embedding.weight"][input_ids]
    for i in range(config["n_layer"]):
        block = under(w, f"backbone.layers.{i}.")
        u, mixer = rms_norm(h, block["norm.weight"]), under(block, "mixer.")
        if i in config.get("attn_layer_idx", []):
            h = h + oracle_attention(config["attn_cfg"], mixer, u)
        else:
            h = h + oracle_layer(layer_config(config, decay), mixer, u)
        if config["d_intermediate"]:
            value, gate = (rms_norm(h, block["norm2.weight"]) @ block["mlp.fc1.weight"].T).chunk(2, -1)
            h = h + (value * gate * torch.sigmoid(gate)) @ block["mlp.fc2.weight"].T
    return rms_norm(h, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T
