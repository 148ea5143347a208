"""How many parameters a model has, and what its export takes, from settings alone: for plans, without Megatron."""

BYTES = {"bfloat16": 2, "float32": 4}

CHECKPOINT = {True: 14, False: 16}
"""Bytes of a checkpoint for each parameter: the weights in bfloat16 (True) or float32, and in float32 the optimizer's
copy of them and two moments. Of nano3 442 GB."""

MEMORY = 4
"""Times the exported weights that an export holds: the model as loaded and as converted, and what is read or written.
Of 31.6B parameters in bfloat16 63 GB, so 253 GB; 256 GB are what is asked for in practice."""


def parameters(settings: dict) -> int | None:
    """Parameters of the model with these settings ("model.hidden_size", ...), None where they do not say it.

    Biases and norms counted for what is published: norms yes, biases of linear layers no. Models with multi-token
    prediction or latent experts are not counted.
    """

    def get(name: str, otherwise=None):
        return settings.get(f"model.{name}", otherwise)

    hidden, vocabulary = get("hidden_size"), get("vocab_size")
    if not hidden or not vocabulary or get("mtp_num_layers") or get("moe_latent_size"):
        return None
    heads = get("num_attention_heads")
    width = get("kv_channels") or hidden // heads
    attention = 2 * hidden * heads * width + 2 * hidden * (get("num_query_groups") or heads) * width + hidden
    pattern = get("hybrid_layer_pattern")
    if not pattern:
        mlp = 3 * hidden * get("ffn_hidden_size") + hidden  # gated, as dense models of today are
        layers = get("num_layers") * (attention + mlp + (2 * width if get("qk_layernorm", True) else 0))
    else:
        layers = sum(_layer(symbol, hidden, attention, get) for symbol in pattern if symbol != "|")
    tied = get("share_embeddings_and_output_weights", False)
    return layers + hidden + vocabulary * hidden * (1 if tied else 2)


def _layer(symbol: str, hidden: int, attention: int, get) -> int:
    match symbol:
        case "*":
            return attention
        case "-":
            return 2 * hidden * get("ffn_hidden_size") + hidden
        case "E":
            experts, shared = get("num_moe_experts"), get("moe_shared_expert_intermediate_size") or 0
            return 2 * hidden * (experts * get("moe_ffn_hidden_size") + shared) + experts * hidden + hidden
    heads = get("mamba_num_heads")
    inner, state = heads * get("mamba_head_dim"), 2 * get("mamba_num_groups") * get("mamba_state_dim")
    projected = hidden * (2 * inner + state + heads) + inner * hidden
    return projected + 5 * (inner + state) + 3 * heads + inner + hidden  # convolution of width 4 with its bias
