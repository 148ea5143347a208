"""What is impossible about a stage of NeMo-RL, found before a job is submitted.

The rules are those of NeMo-RL's own setup (nemo_rl/algorithms/grpo.py, nemo_rl/models/policy/lm_policy.py), which finds
them minutes after a job began, and of batches that would silently be something else than the recipe says.
"""

import re
from typing import Any

EXPORTABLE = {
    "policy.dtensor_cfg._v2": True,
    "checkpointing.model_save_format": "safetensors",
    "checkpointing.save_consolidated": True,
}
"""What a policy on DTensor is saved with, so that its states can be exported: whole models that transformers reads."""

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class _Settings:
    """Settings by name, of the recipe over the example, with references followed."""

    def __init__(self, known: dict):
        self._known = known

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self._known.get(key, default)
        for _ in range(5):
            match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
            if match is None:
                break
            value = self._known.get(match[1], default)
        # What is computed is not followed: its parts are checked
        return default if isinstance(value, str) and value.startswith("${") else value


def check(algorithm: str, below: dict, own: dict, resources: dict, gym: bool) -> tuple[str, list[str]]:
    """The layout in a line, and all that is impossible, in sentences.

    below: settings of the example and the algorithm. own: the recipe's, which win. resources: {"nodes",
    "gpus_per_node"}. gym: whether NeMo-Gym judges.
    """
    get = _Settings(below | own)
    problems: list[str] = []
    nodes, each = own.get("cluster.num_nodes", resources["nodes"]), resources["gpus_per_node"]
    if nodes > resources["nodes"]:
        problems.append(f"cluster.num_nodes: {nodes}: the stage has {resources['nodes']} nodes, see its resources")
    world, generating = nodes * each, 0
    samples = algorithm in ("grpo", "dapo", "distillation")
    colocated = get("policy.generation.colocated.enabled", True)
    if samples and not colocated:
        generating = _apart(get, nodes, each, problems)
        world -= generating
    line = _training(get, world, problems) if world > 0 else ""
    if samples:
        line += _generation(get, each, world if colocated else generating, problems)
        _batches(get, "distillation" if algorithm == "distillation" else "grpo", problems)
        _lengths(get, problems)
    if algorithm != "rm" and get("policy.dtensor_cfg.enabled", False):
        for key, value in EXPORTABLE.items():
            if own.get(key, value) != value:
                problems.append(f"{key}: {own[key]!r}: with DTensor it must be {value!r}, or no state can be exported")
    if gym:
        for key in ("async_engine", "expose_http_server"):
            if own.get(f"policy.generation.vllm_cfg.{key}") is False:
                problems.append(f"policy.generation.vllm_cfg.{key}: must be true: NeMo-Gym asks vLLM over HTTP")
    if get("grpo.async_grpo.enabled", False) and algorithm in ("grpo", "dapo"):
        _asynchronous(get, colocated, problems)
    return line, problems


def _apart(get: _Settings, nodes: int, each: int, problems: list[str]) -> int:
    """GPUs that only generate; a problem where they are not said or leave none."""
    place = "policy.generation.colocated.resources"
    if nodes == 1:
        count = get(f"{place}.gpus_per_node")
        if not count or count >= each:
            problems.append(
                f"{place}.gpus_per_node: {count}: give how many of the {each} GPUs generate, and leave some"
            )
            return 0
        return count
    count = get(f"{place}.num_nodes")
    if not count or count >= nodes:
        problems.append(f"{place}.num_nodes: {count}: give how many of the {nodes} nodes generate, and leave some")
        return 0
    return count * each


def _training(get: _Settings, world: int, problems: list[str]) -> str:
    """The policy's layout in a line."""
    megatron, dtensor = get("policy.megatron_cfg.enabled", False), get("policy.dtensor_cfg.enabled", False)
    if bool(megatron) == bool(dtensor):
        problems.append(
            "policy.megatron_cfg.enabled and policy.dtensor_cfg.enabled: "
            f"are both {str(bool(megatron)).lower()}; one of them trains"
        )
        return ""
    if megatron:
        names = {
            "TP": "policy.megatron_cfg.tensor_model_parallel_size",
            "PP": "policy.megatron_cfg.pipeline_model_parallel_size",
            "CP": "policy.megatron_cfg.context_parallel_size",
        }
    else:
        names = {"TP": "policy.dtensor_cfg.tensor_parallel_size", "CP": "policy.dtensor_cfg.context_parallel_size"}
    sizes = {short: get(key, 1) for short, key in names.items()}
    replica = 1
    for size in sizes.values():
        replica *= size
    layout = " ".join(f"{short}{size}" for short, size in sizes.items() if size > 1)
    if world % replica:
        of = " x ".join(f"{short}{size}" for short, size in sizes.items())
        problems.append(f"resources: {world} GPUs train, and a replica of {of} takes {replica}; give a multiple of it")
        return layout
    if megatron:
        expert, tensor = (get(f"policy.megatron_cfg.expert_{n}_parallel_size", 1) for n in ("model", "tensor"))
        if (world // sizes["PP"]) % (expert * tensor):
            problems.append(
                f"policy.megatron_cfg.expert_model_parallel_size: {expert} x expert_tensor_parallel_size {tensor} does "
                f"not divide the {world // sizes['PP']} GPUs of a pipeline stage"
            )
        layout += f" EP{expert}" if expert > 1 else ""
    replicas = world // replica
    batch = get("policy.train_global_batch_size")
    micro = get("policy.train_micro_batch_size", 1)
    packed = get("policy.sequence_packing.enabled", False) or get("policy.dynamic_batching.enabled", False)
    unit = replicas if packed else replicas * micro
    if batch and batch % unit:
        how = f"{replicas} replicas" + ("" if packed else f" x micro batches of {micro}")
        problems.append(f"policy.train_global_batch_size: {batch}: is no multiple of {unit} ({how})")
    logprob = get("policy.logprob_batch_size", micro)
    if sizes["TP"] >= 4 and logprob != micro and not get("loss_fn.force_on_policy_ratio", False):
        problems.append(
            f"policy.logprob_batch_size: {logprob}: must equal policy.train_micro_batch_size {micro} from TP4 on, "
            "where log probabilities depend on the batch they are computed in"
        )
    return f"{layout} DP{replicas}".strip()


def _generation(get: _Settings, each: int, world: int, problems: list[str]) -> str:
    """vLLM's layout."""
    if get("policy.generation.backend", "vllm") != "vllm":
        return ""
    tensor, pipeline, expert = (
        get(f"policy.generation.vllm_cfg.{n}_parallel_size", 1) for n in ("tensor", "pipeline", "expert")
    )
    where = "policy.generation.vllm_cfg"
    if world % (tensor * pipeline):
        problems.append(
            f"{where}.tensor_parallel_size: {tensor} x pipeline_parallel_size {pipeline} does not divide the {world} "
            "GPUs that generate"
        )
    elif tensor <= each and each % tensor:
        problems.append(f"{where}.tensor_parallel_size: {tensor}: does not divide the {each} GPUs of a node")
    if expert > 1 and expert % tensor:
        problems.append(f"{where}.expert_parallel_size: {expert}: must be a multiple of tensor_parallel_size {tensor}")
    return f", vLLM TP{tensor}" + (f" PP{pipeline}" if pipeline > 1 else "")


def _batches(get: _Settings, section: str, problems: list[str]) -> None:
    prompts, each = get(f"{section}.num_prompts_per_step"), get(f"{section}.num_generations_per_prompt")
    batch = get("policy.train_global_batch_size")
    if not (prompts and each and batch):
        return
    made = prompts * each
    if made % batch:
        problems.append(
            f"policy.train_global_batch_size: {batch}: a step samples {section}.num_prompts_per_step {prompts} x "
            f"num_generations_per_prompt {each} = {made}; train on all at once ({made}), or on equal parts"
        )
    elif made != batch and get("loss_fn.force_on_policy_ratio", False):
        problems.append(
            f"policy.train_global_batch_size: {batch}: must be {made}, prompts x generations, where "
            "loss_fn.force_on_policy_ratio says that training is on-policy"
        )
    if section == "grpo" and get("grpo.batch_multiplier", 1) != 1 and not get("grpo.use_dynamic_sampling", False):
        problems.append("grpo.batch_multiplier: must be 1 without grpo.use_dynamic_sampling")


def _lengths(get: _Settings, problems: list[str]) -> None:
    longest = get("policy.max_total_sequence_length")
    for key in ("policy.generation.max_new_tokens", "policy.generation.vllm_cfg.max_model_len"):
        value = get(key)
        if longest and value and value > longest:
            problems.append(
                f"{key}: {value}: what is longer than policy.max_total_sequence_length {longest} is not trained on"
            )


def _asynchronous(get: _Settings, colocated: bool, problems: list[str]) -> None:
    if colocated:
        problems.append("policy.generation.colocated.enabled: must be false with grpo.async_grpo")
    if not get("loss_fn.use_importance_sampling_correction", False):
        problems.append("loss_fn.use_importance_sampling_correction: must be true with grpo.async_grpo")
    for key in ("grpo.use_dynamic_sampling", "grpo.reward_scaling.enabled", "grpo.reward_shaping.enabled"):
        if get(key, False):
            problems.append(f"{key}: must be false with grpo.async_grpo, which does not have it")
