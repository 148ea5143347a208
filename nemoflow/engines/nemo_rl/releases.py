"""The releases of NeMo-RL that are supported: what to run for each algorithm, over which example, with which data keys.

Read from the repository NVIDIA-NeMo/RL: tag v0.7.0, and branch nano-v3 (823fcc90), which the image
v0.4.0.nemotron_3_nano is made from and which calls itself 0.5.0rc0. Where they differ is here and in keys.json alone.
"""

from dataclasses import dataclass, field
from typing import Any

from nemoflow.errors import NemoflowError

DEFAULT = "v0.7.0"

VERSIONS = {"v0.7.0": "0.7.0", "v0.4.0.nemotron_3_nano": "0.5.0rc0"}
"""Release, by the tag of its image -> what nemo_rl/package_info.py in it says."""

_NANO = "examples/nemo_gym/grpo_nanov3.yaml"
_MATH = "examples/configs/grpo_math_1B.yaml"
_DAPO = {
    "grpo.use_dynamic_sampling": True,
    "grpo.dynamic_sampling_max_gen_batches": 10,
    "grpo.batch_multiplier": 3,
    "grpo.use_leave_one_out_baseline": False,
    "grpo.overlong_filtering": False,
    "grpo.reward_scaling.enabled": True,
    "grpo.reward_scaling.source_min": 0.0,
    "grpo.reward_scaling.source_max": 1.0,
    "grpo.reward_scaling.target_min": -1.0,
    "grpo.reward_scaling.target_max": 1.0,
    "grpo.reward_shaping.enabled": True,
    "grpo.reward_shaping.overlong_buffer_length": 2048,
    "grpo.reward_shaping.overlong_buffer_penalty": 1,
    "grpo.reward_shaping.max_response_length": 14336,
    "loss_fn.reference_policy_kl_penalty": 0.0,
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.ratio_clip_max": 0.28,
    "loss_fn.ratio_clip_c": 10,
    "loss_fn.token_level_loss": True,
}
"""What makes GRPO DAPO (arXiv:2503.14476), with the numbers of NeMo-RL's own dapo-qwen2.5-7b; part of what
`algorithm: dapo` means, so never changed."""


@dataclass(frozen=True)
class Entry:
    """How an algorithm is run in a release.

    module: of nemo_rl.algorithms, with its MasterConfig. section: of the configuration, with its steps. own and gym:
    (script, example) for NeMo-RL's own environments or none, and for NeMo-Gym's; None where it has no such script.
    settings: what the algorithm is, over the example.
    """

    module: str
    section: str
    own: tuple[str, str] | None
    gym: tuple[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def examples(self) -> list[str]:
        return [pair[1] for pair in (self.own, self.gym) if pair]


def _entries(grpo: str, distillation: str, distillation_gym: tuple[str, str] | None) -> dict[str, Entry]:
    gym = ("examples/nemo_gym/run_grpo_nemo_gym.py", _NANO)
    return {
        "grpo": Entry("grpo", "grpo", (grpo, _MATH), gym),
        "dapo": Entry("grpo", "grpo", (grpo, _MATH), gym, _DAPO),
        "dpo": Entry("dpo", "dpo", ("examples/run_dpo.py", "examples/configs/dpo.yaml")),
        "rm": Entry("rm", "rm", ("examples/run_rm.py", "examples/configs/rm.yaml")),
        "distillation": Entry(
            "distillation",
            "distillation",
            (distillation, "examples/configs/distillation_math.yaml"),
            distillation_gym,
        ),
    }


RELEASES: dict[str, dict[str, Entry]] = {
    "v0.7.0": _entries(
        "examples/run_grpo.py",
        "examples/run_distillation.py",
        ("examples/nemo_gym/run_distillation_nemo_gym.py", "examples/nemo_gym/distillation_qwen3_0_6b.yaml"),
    ),
    "v0.4.0.nemotron_3_nano": _entries("examples/run_grpo_math.py", "examples/run_distillation_math.py", None),
}

FROM_MEGATRON = ("v0.7.0",)
"""Releases with checkpointing.pretrained_checkpoint, which start from a Megatron checkpoint as it is."""

VALIDATED = ("v0.7.0",)
"""Releases that refuse a configuration without a key that they require. Before, the classes only describe."""

_PARALLEL = [
    "enabled",
    "context_parallel_size",
    "sequence_parallel",
]
READ_BY_CHECKS = [
    *(f"policy.megatron_cfg.{name}" for name in _PARALLEL),
    "policy.megatron_cfg.tensor_model_parallel_size",
    "policy.megatron_cfg.pipeline_model_parallel_size",
    "policy.megatron_cfg.expert_model_parallel_size",
    "policy.megatron_cfg.expert_tensor_parallel_size",
    "policy.megatron_cfg.scheduler.lr_decay_iters",
    *(f"policy.dtensor_cfg.{name}" for name in _PARALLEL),
    "policy.dtensor_cfg.tensor_parallel_size",
    "policy.dtensor_cfg.expert_parallel_size",
    "policy.train_global_batch_size",
    "policy.train_micro_batch_size",
    "policy.logprob_batch_size",
    "policy.max_total_sequence_length",
    "policy.sequence_packing.enabled",
    "policy.dynamic_batching.enabled",
    "policy.generation.backend",
    "policy.generation.max_new_tokens",
    "policy.generation.colocated.enabled",
    "policy.generation.colocated.resources.gpus_per_node",
    "policy.generation.colocated.resources.num_nodes",
    "policy.generation.vllm_cfg.tensor_parallel_size",
    "policy.generation.vllm_cfg.pipeline_parallel_size",
    "policy.generation.vllm_cfg.expert_parallel_size",
    "policy.generation.vllm_cfg.max_model_len",
    "policy.generation.vllm_cfg.async_engine",
    "policy.generation.vllm_cfg.expose_http_server",
    "grpo.num_prompts_per_step",
    "grpo.num_generations_per_prompt",
    "grpo.max_val_samples",
    "grpo.val_period",
    "grpo.use_dynamic_sampling",
    "grpo.batch_multiplier",
    "grpo.async_grpo.enabled",
    "grpo.reward_scaling.enabled",
    "grpo.reward_shaping.enabled",
    "distillation.num_prompts_per_step",
    "distillation.num_generations_per_prompt",
    "distillation.val_period",
    "dpo.val_period",
    "rm.val_period",
    "loss_fn.use_importance_sampling_correction",
    "loss_fn.force_on_policy_ratio",
    "checkpointing.metric_name",
    "checkpointing.save_period",
]
"""The settings that geometry.py reads: their values in each example stand in keys.json."""

OWN = {
    "math": {"env_name": "math", "processor": "math_hf_data_processor", "input_key": "question"},
}
"""NeMo-RL's own environments that rows of kind `prompts` have the fields for: how its ResponseDataset reads them. The
answer to compare with is `expected_answer`."""

POLICY_SERVER = "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"
"""NeMo-Gym's configuration of the model that is trained, which stands before those of the environments."""


def is_gym(environments: dict) -> bool:
    """Whether these environments, of a frozen stage, are NeMo-Gym's."""
    return any("gym" in each for each in environments.values())


def example(release: str, algorithm: str, environments: dict) -> tuple[str, str]:
    """(script, example), relative to NeMo-RL's directory.

    Raises NemoflowError where the release has no script for it.
    """
    entry = RELEASES[release][algorithm]
    pair = entry.gym if is_gym(environments) else entry.own
    if pair is None:
        raise NemoflowError(f"algorithm: {algorithm}: NeMo-RL {release} has no script for it with NeMo-Gym")
    return pair


EXAMPLE_SERVERS = ("math_with_judge", "code_gen")
"""NeMo-Gym's servers that examples have settings for."""

ELSEWHERE = {
    "v0.7.0": {},
    "v0.4.0.nemotron_3_nano": {
        "data.train_data_path": "str",
        "data.val_data_path": "str",
        "data.input_key": "str",
        "data.output_key": "str",
        "data.env_name": "str",
    },
}
"""Settings that are in no class and no example: nemo_rl/data/datasets reads them by name."""
