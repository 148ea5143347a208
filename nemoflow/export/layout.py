"""The published form of a NemotronH checkpoint: which tensors it holds, of which shapes, under which names.

The names are those of NVIDIA's releases (`backbone.embeddings.weight`, one tensor per expert), which transformers,
vLLM and Megatron-Bridge read. No torch here: a safetensors file says what it holds in its first bytes.
"""

import json
import math
import struct
from pathlib import Path

from nemoflow.errors import NemoflowError

ROUTER_BIAS = "mixer.gate.e_score_correction_bias"
"""The expert bias that balances the routing: a buffer, no parameter, and float32 whatever the other tensors are."""

Shapes = dict[str, tuple[int, ...]]


def _mamba(c: dict) -> Shapes:
    heads, inner = c["mamba_num_heads"], c["mamba_num_heads"] * c["mamba_head_dim"]
    convolved = inner + 2 * c["n_groups"] * c["ssm_state_size"]  # x, B and C pass the convolution, z and dt do not
    return {
        "A_log": (heads,),
        "D": (heads,),
        "conv1d.bias": (convolved,),
        "conv1d.weight": (convolved, 1, c["conv_kernel"]),
        "dt_bias": (heads,),
        "in_proj.weight": (inner + convolved + heads, c["hidden_size"]),
        "norm.weight": (inner,),
        "out_proj.weight": (c["hidden_size"], inner),
    }


def _attention(c: dict) -> Shapes:
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    return {
        "k_proj.weight": (keys, c["hidden_size"]),
        "o_proj.weight": (c["hidden_size"], queries),
        "q_proj.weight": (queries, c["hidden_size"]),
        "v_proj.weight": (keys, c["hidden_size"]),
    }


def _mlp(width: int, intermediate: int, prefix: str = "") -> Shapes:
    return {
        f"{prefix}down_proj.weight": (width, intermediate),
        f"{prefix}up_proj.weight": (intermediate, width),
    }


def _moe(c: dict) -> Shapes:
    hidden, latent, experts = c["hidden_size"], c.get("moe_latent_size"), c["n_routed_experts"]
    shapes = {"gate.e_score_correction_bias": (experts,), "gate.weight": (experts, hidden)}
    if latent:
        shapes |= {"fc1_latent_proj.weight": (latent, hidden), "fc2_latent_proj.weight": (hidden, latent)}
    for i in range(experts):
        shapes |= _mlp(latent or hidden, c["moe_intermediate_size"], f"experts.{i}.")
    return shapes | _mlp(hidden, c["moe_shared_expert_intermediate_size"], "shared_experts.")


_MIXERS = {
    "M": _mamba,
    "*": _attention,
    "E": _moe,
    "-": lambda c: _mlp(c["hidden_size"], c["intermediate_size"]),
}


def expected(config: dict) -> Shapes:
    """Name -> shape of every tensor that a checkpoint with this config.json holds, in the order of the layers."""
    c = config
    shapes: Shapes = {"backbone.embeddings.weight": (c["vocab_size"], c["hidden_size"])}
    for i, symbol in enumerate(c["hybrid_override_pattern"]):
        layer = f"backbone.layers.{i}."
        shapes[f"{layer}norm.weight"] = (c["hidden_size"],)
        shapes |= {f"{layer}mixer.{name}": shape for name, shape in _MIXERS[symbol](c).items()}
    shapes["backbone.norm_f.weight"] = (c["hidden_size"],)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
    return shapes


def compare(found: Shapes, wanted: Shapes, where: str) -> None:
    """Raise NemoflowError, starting with `where`, unless `found` has exactly the tensors and shapes of `wanted`."""
    for title, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise NemoflowError(
                f"{where}: {len(names)} tensors are {title}: {shown}{', ...' if len(names) > 3 else ''}"
            )
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise NemoflowError(f"{where}: {name} has the shape {list(found[name])}, its config says {list(shape)}")


def header(file: Path) -> dict[str, dict]:
    """Name -> {"dtype", "shape", "data_offsets"} of the tensors in a safetensors file, read from its header alone.

    Raises NemoflowError when the file is cut off or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            if not 2 <= length <= size - 8:
                raise ValueError("no header")
            entries = json.loads(stream.read(length))
        except ValueError:
            raise NemoflowError(f"{file}: is cut off, or no safetensors file ({size} bytes)") from None
    entries.pop("__metadata__", None)
    end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    if end != size:
        raise NemoflowError(f"{file}: has {size} bytes where its header says {end}; it is cut off or damaged")
    return entries


def weights(directory: Path) -> dict[str, dict]:
    """`header` of all safetensors files of a checkpoint together. Raises NemoflowError when there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise NemoflowError(f"{directory}: holds no *.safetensors file; a Hugging Face checkpoint is wanted")
    found: dict[str, dict] = {}
    for file in files:
        found |= header(file)
    return found


def parameters(entries: dict[str, dict]) -> int:
    """How many parameters a checkpoint has; the router's bias is a buffer and does not count."""
    return sum(math.prod(e["shape"]) for name, e in entries.items() if not name.endswith(ROUTER_BIAS))
