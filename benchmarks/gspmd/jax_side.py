"""What JAX's compiler moves for the GPT of examples/gpt.py, read from its compiled program.

Run by compare.py in the peers' environment; prints JSON: per plan, bytes a rank receives.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

VOCABULARY = 256


def shapes(depth: int, width: int, context: int, heads: int) -> dict:
    size = width // heads
    block = {
        "attn_norm": {"w": (width,), "b": (width,)},
        "q": {"w": (width, heads, size), "b": (heads, size)},
        "k": {"w": (width, heads, size)},
        "v": {"w": (width, heads, size), "b": (heads, size)},
        "o": {"w": (heads, size, width), "b": (width,)},
        "mlp_norm": {"w": (width,), "b": (width,)},
        "up": {"w": (width, 4 * width), "b": (4 * width,)},
        "down": {"w": (4 * width, width), "b": (width,)},
    }
    return {
        "token": (VOCABULARY, width),
        "position": (context, width),
        "blocks": [block] * depth,
        "norm": {"w": (width,), "b": (width,)},
        "head": (width, VOCABULARY),
    }


MEGATRON = {
    "q": {"w": P(None, "tensor", None), "b": P("tensor", None)},
    "k": {"w": P(None, "tensor", None)},
    "v": {"w": P(None, "tensor", None), "b": P("tensor", None)},
    "o": {"w": P("tensor", None, None), "b": P()},
    "up": {"w": P(None, "tensor"), "b": P("tensor")},
    "down": {"w": P("tensor", None), "b": P()},
}


def is_shape(x: object) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def specs(model: dict, *, tensor: bool) -> dict:
    """The annotations: Megatron's for blocks and head where `tensor`, all else replicated."""
    whole = jax.tree.map(lambda _: P(), model, is_leaf=is_shape)
    if not tensor:
        return whole
    blocks = [{**block, **MEGATRON} for block in whole["blocks"]]
    return {**whole, "blocks": blocks, "head": P(None, "tensor")}


def rested(model: dict, spec: dict, data: int) -> dict:
    """ZeRO-3: the first free dim that `data` divides is split over it, small vectors apart."""

    def one(shape: tuple[int, ...], found: P) -> P:
        named = [*found, *[None] * (len(shape) - len(found))]
        if math.prod(shape) * 4 < 1024:
            return found
        for dim, size in enumerate(shape):
            if named[dim] is None and size % data == 0:
                named[dim] = "data"
                return P(*named)
        return found

    return jax.tree.map(one, model, spec, is_leaf=is_shape)


def norm(x: jax.Array, p: dict) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["w"] + p["b"]


def forward(params: dict, x: jax.Array) -> jax.Array:
    h = params["token"][x] + params["position"][None]
    t = x.shape[1]
    causal = jnp.tril(jnp.ones((t, t), bool))
    for p in params["blocks"]:
        y = norm(h, p["attn_norm"])
        q = jnp.einsum("btw,whd->bhtd", y, p["q"]["w"]) + p["q"]["b"][:, None]
        k = jnp.einsum("btw,whd->bhtd", y, p["k"]["w"])
        v = jnp.einsum("btw,whd->bhtd", y, p["v"]["w"]) + p["v"]["b"][:, None]
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
        mixed = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhts,bhsd->bhtd", mixed, v)
        h = h + jnp.einsum("bhtd,hdw->btw", mixed, p["o"]["w"]) + p["o"]["b"]
        y = norm(h, p["mlp_norm"])
        y = jax.nn.gelu(y @ p["up"]["w"] + p["up"]["b"], approximate=False)
        h = h + y @ p["down"]["w"] + p["down"]["b"]
    return norm(h, params["norm"]) @ params["head"]


def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    logp = jax.nn.log_softmax(forward(params, x), axis=-1)
    return -(jax.nn.one_hot(y, VOCABULARY) * logp).sum() / y.size


SIZES = {"f32": 4, "f64": 8, "s32": 4, "u32": 4, "pred": 1, "bf16": 2, "s64": 8}
CALL = re.compile(
    r"= (?P<shape>.*?) (?P<op>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\("
)
GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]+)\})")


def received(text: str) -> dict[str, int]:
    """Bytes that a rank receives, by collective, each by the best algorithm."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        match = CALL.search(line)
        if match is None:
            continue
        size = sum(
            SIZES[kind] * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match["shape"])
        )
        groups = GROUPS.search(line)
        n = 8 if groups is None else int(groups[2] or len(groups[3].split(",")))
        op = match["op"]
        moved = {
            "all-reduce": 2 * size * (n - 1) // n,
            "all-gather": size * (n - 1) // n,
            "reduce-scatter": size * (n - 1),
            "all-to-all": size * (n - 1) // n,
            "collective-permute": size,
        }[op]
        found[op] = found.get(op, 0) + moved
    return found


def compiled(plan: dict, depth: int, width: int, context: int, batch: int) -> dict[str, int]:
    data, tensor, zero = plan["data"], plan["tensor"], plan["zero"]
    mesh = Mesh(np.array(jax.devices()[: data * tensor]).reshape(data, tensor), ("data", "tensor"))
    model = shapes(depth, width, context, max(1, width // 32))
    spec = specs(model, tensor=tensor > 1)
    if zero == 3:
        spec = rested(model, spec, data)
    place = jax.tree.map(lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, P))
    rows = NamedSharding(mesh, P("data", None))
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model, is_leaf=is_shape
    )
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    whole = NamedSharding(mesh, P())
    step = jax.jit(
        jax.value_and_grad(loss), in_shardings=(place, rows, rows), out_shardings=(whole, place)
    )
    return received(step.lower(abstract, tokens, tokens).compile().as_text())


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps({p["name"]: compiled(p, **asked["model"]) for p in asked["plans"]}))
