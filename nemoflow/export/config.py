"""config.json of an exported model: what today's transformers reads, spelled so that older readers and vLLM do too."""

import math
from typing import Any

from nemoflow.errors import NemoflowError

LARGEST = 3.4028234663852886e38
"""The largest finite float32. As an upper limit it means "none" to every float32 step size, and it is plain JSON."""

SMALLEST_STEP = 1e-12
"""Lower bound of Mamba's step size dt, in effect none.

Megatron and the Mamba kernels do not bound dt from below; transformers' torch path bounds it by `time_step_min`, which
is meant for initialising dt_bias. With the customary 1e-3 a trained model would compute something else there than where
it was trained. Zero would say it best, but its logarithm is taken when a new model is made from the config.
"""

_FROM_CONFIG = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "chunk_size",
    "conv_kernel",
    "expand",
    "head_dim",
    "hidden_dropout",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_epsilon",
    "mamba_head_dim",
    "mamba_hidden_act",
    "mamba_num_heads",
    "mamba_proj_bias",
    "mamba_ssm_cache_dtype",
    "max_position_embeddings",
    "mlp_bias",
    "mlp_hidden_act",
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "n_group",
    "n_groups",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_key_value_heads",
    "num_logits_to_keep",
    "num_nextn_predict_layers",
    "pad_token_id",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "routed_scaling_factor",
    "ssm_state_size",
    "tie_word_embeddings",
    "time_step_floor",
    "time_step_max",
    "topk_group",
    "use_bias",
    "use_conv_bias",
    "vocab_size",
)


def published(config: Any, dtype: str) -> dict:
    """The content of config.json for a transformers NemotronHConfig whose weights are stored as `dtype`.

    Older readers know the layers by `hybrid_override_pattern` and `num_hidden_layers`, and take neither an infinite
    number nor transformers' object for one.

    Raises NemoflowError for what the published format, or this export, cannot say.
    """
    if config.num_nextn_predict_layers:
        raise NemoflowError("num_nextn_predict_layers: models with multi-token prediction are not exported yet; set 0")
    for bias in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        if getattr(config, bias):
            raise NemoflowError(f"{bias}: the published Nemotron-H format has no bias terms in linear layers")
    end = config.eos_token_id
    low, high = config.time_step_limit
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **{name: getattr(config, name) for name in _FROM_CONFIG},
        "eos_token_id": end[0] if isinstance(end, list) else end,
        "hybrid_override_pattern": config.hybrid_override_pattern,
        "norm_eps": config.layer_norm_epsilon,
        "num_hidden_layers": config.num_hidden_layers,
        "time_step_limit": [low, min(high, LARGEST) if math.isfinite(high) else LARGEST],
        "time_step_min": min(config.time_step_min, SMALLEST_STEP),
        "torch_dtype": dtype,
        "use_cache": True,  # trainers turn it off, and save the config so
        "use_mamba_kernels": True,  # where they are installed; elsewhere transformers' torch path
    }
