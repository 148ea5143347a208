"""Whether a training can be laid out over its GPUs: parallel sizes, batches, lengths, layers and precision.

Pure Python, from the recipe and the table of keys.py; what this accepts, Megatron-Bridge's own validation accepts (a
property test). Letters as in Megatron: TP, PP, CP, DP tensor, pipeline, context and data parallel size; EP and ETP
expert parallel and expert tensor parallel size; VPP virtual pipeline stages of a rank. Conditions are those of
megatron-bridge 0.6.2 (ConfigContainer.validate and the providers) and megatron-core 0.19.2 (TransformerConfig,
parallel_state, hybrid_layer_allocation, mamba_mixer, mamba_context_parallel, schedules).
"""

import math
import re
from collections.abc import Iterator, Sequence

from nemoflow.engines.megatron_bridge import keys

HF = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads",),
    "kv_channels": ("head_dim",),
    "num_moe_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "moe_router_topk": ("num_experts_per_tok",),
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
    "moe_router_num_groups": ("n_group",),
    "moe_router_group_topk": ("topk_group",),
    "moe_shared_expert_intermediate_size": (
        "moe_shared_expert_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    "mtp_num_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers"),
    "mtp_hybrid_override_pattern": ("mtp_hybrid_override_pattern",),
    "hybrid_layer_pattern": ("hybrid_override_pattern",),
    "mamba_num_heads": ("mamba_num_heads",),
    "mamba_head_dim": ("mamba_head_dim",),
    "mamba_state_dim": ("ssm_state_size",),
    "mamba_num_groups": ("n_groups",),
}
"""Model setting -> its names in a Hugging Face config.json; as Megatron-Bridge's converters map them."""

LAYERS = {"mamba": "M", "attention": "*", "moe": "E", "mlp": "-", "linear_attention": "G"}
"""Kinds of layer as newer configs of Nemotron-H list them (`layers_block_type`), as letters of a pattern."""

CAPABILITY = {
    "v100": 7.0,
    "t4": 7.5,
    "a100": 8.0,
    "a800": 8.0,
    "a30": 8.0,
    "a10": 8.6,
    "a40": 8.6,
    "l4": 8.9,
    "l40": 8.9,
    "l40s": 8.9,
    "h100": 9.0,
    "h200": 9.0,
    "h800": 9.0,
    "h20": 9.0,
    "gh200": 9.0,
    "b200": 10.0,
    "gb200": 10.0,
    "b300": 10.3,
    "gb300": 10.3,
}
"""GPU type -> CUDA compute capability (developer.nvidia.com/cuda-gpus)."""

FP8 = {
    "delayed": (8.9, 99, "Ada, Hopper or Blackwell (l40s, h100, h200, b200, ...)"),
    "tensorwise": (8.9, 99, "Ada, Hopper or Blackwell (l40s, h100, h200, b200, ...)"),
    "blockwise": (9.0, 9.9, "Hopper (h100, h200)"),
    "mxfp8": (10.0, 10.9, "Blackwell (b200, b300, gb200, gb300)"),
}
"""FP8 recipe -> least and greatest compute capability, and how these GPUs are called; from MixedPrecisionConfig and
Transformer Engine's own checks."""

DISPATCHERS = {
    "deepep": (8.0, 10.9, "Ampere, Hopper, B200 or B300"),
    "hybridep": (8.0, 10.9, "Ampere, Hopper or Blackwell"),
    "ncclep": (9.0, 10.9, "Hopper or Blackwell"),
}
"""Backend of the flex dispatcher -> the GPUs that Megatron-Bridge allows it on."""

EXPERTS_ONLY = (
    "moe_ffn_hidden_size",
    "moe_pad_expert_input_to_capacity",
    "moe_router_group_topk",
)
"""Settings of the model that Megatron-Core refuses where there are no experts."""

STEP = {"fp8": 16, "mxfp8": 32, "fp4": 16}
"""What the sides of a matrix must be multiples of for Transformer Engine to multiply it in this precision."""


def check(
    function: str | None,
    overrides: dict,
    resources: dict,
    hf_config: dict | None,
    kind: str,
    pack: int | None,
    parents: Sequence[tuple[str | None, dict]] = (),
) -> tuple[str, list[str]]:
    """A line on how a training is laid out, and what is impossible about it.

    resources: nodes, gpus_per_node, gpu. pack: tokens of a packed row, for kind `sft`. parents: functions and overrides
    of the stages it starts from, first to last.
    """
    known, notes, wrong = settings(function, overrides, hf_config, kind, pack, parents)
    world = resources["nodes"] * resources["gpus_per_node"]
    wrong += problems(known, world, resources.get("gpu"), kind, pack)
    if resources.get("gpu") and capability(resources["gpu"]) is None:
        notes.append(f"the precision on {resources['gpu']}, a type of GPU that is not known here")
    return _summary(known, resources) + (f"; not checked: {', '.join(notes)}" if notes else ""), wrong


def settings(
    function: str | None,
    overrides: dict,
    hf_config: dict | None,
    kind: str,
    pack: int | None,
    parents: Sequence[tuple[str | None, dict]] = (),
) -> tuple[dict, list[str], list[str]]:
    """The settings a job would have, by section.key, as far as they are known without Megatron.

    Besides: what cannot be checked because it is not known, and what is already wrong.
    """
    table, entry = keys.table(), keys.function(function)
    notes: list[str] = []
    wrong: list[str] = []
    found: dict = {}
    if entry is None and (unknown := keys.misspelt(function)):
        wrong.append(f"function: {function}: {unknown}")
    elif entry is None:
        notes.append(f"what {function} sets, which is not among the recipe functions known here")
        if hf_config:
            found |= _of_hf(hf_config)
    if entry is not None:
        own = {key: value for key, value in entry["values"].items() if key.startswith("model.")}
        for section, classes in table["sections"].items():
            if section in keys.VALUES and section != "model":
                cls = entry["dataset"] if section == "dataset" else classes[0]
                found |= {f"{section}.{name}": value for name, value in table["defaults"].get(cls, {}).items()}
        found |= {key: value for key, value in entry["values"].items() if key not in own}
        if entry["model"]:
            found |= _usual(entry["model"]) | own
        elif kind == "sft" and parents:
            (parent, theirs), before = parents[-1], parents[:-1]
            model, more, _ = settings(parent, theirs, hf_config, "sft", None, before)
            notes += more
            found |= {key: value for key, value in model.items() if key.startswith("model.")} | own
        elif hf_config:
            pattern = "hybrid_override_pattern" in hf_config or "layers_block_type" in hf_config
            found |= _usual("HybridModelProvider" if pattern else "GPTModelProvider") | _of_hf(hf_config) | own
        elif kind == "sft":
            same = _maker(entry["hub"])
            if same:
                found |= _usual(same["model"]) | {k: v for k, v in same["values"].items() if k.startswith("model.")}
            else:
                notes.append("the model, which is that of the checkpoint it starts from")
            found |= own
        else:
            wrong.append(f"function: {function} asks the hub for {entry['hub']}; write the recipe's hf_config instead")
            found |= own
    if kind == "sft" and pack:
        found |= {"dataset.seq_length": pack, "model.seq_length": pack, "train.micro_batch_size": 1}
    found |= overrides
    if kind == "pretrain":
        wrong += _same_length(overrides, found)
    wrong += _set_precision(found, entry, overrides)
    _derive(found, complete=entry is not None)
    return found, notes, wrong


def _usual(model: str) -> dict:
    return {f"model.{name}": value for name, value in keys.table()["defaults"][model].items()}


def _maker(hub: str) -> dict | None:
    """A function that makes the model which another one asks the hub for: they name the same tokenizer."""
    functions = keys.table()["functions"].values()
    return next(
        (f for f in functions if f["tokenizer"] == hub and f["model"] and f["dataset"] == "GPTDatasetConfig"), None
    )


def _of_hf(config: dict) -> dict:
    """A Hugging Face config.json as settings of the model."""
    found = {}
    for name, theirs in HF.items():
        value = next((config[each] for each in theirs if config.get(each) is not None), None)
        if value is not None:
            found[f"model.{name}"] = value
    blocks = config.get("layers_block_type")
    if blocks and "model.hybrid_layer_pattern" not in found and all(block in LAYERS for block in blocks):
        found["model.hybrid_layer_pattern"] = "".join(LAYERS[block] for block in blocks)
        found["model.num_layers"] = len(blocks)
    return found


def _same_length(overrides: dict, found: dict) -> list[str]:
    length, own = found.get("model.seq_length"), overrides.get("dataset.seq_length")
    if length is None or own in (None, length):
        return []
    return [f"overrides.dataset.seq_length: {own} differs from model.seq_length, {length}; leave it out"]


def _set_precision(found: dict, entry: dict | None, overrides: dict) -> list[str]:
    """Set what a job takes from the mixed precision recipe. Changes `found`; returns what is wrong."""
    precision = (entry or {}).get("precision")
    wrong = []
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if key == "mixed_precision":
            precision = keys.table()["precisions"].get((value or "").replace("-", "_"))
        elif section == "mixed_precision" and precision:
            precision = precision | {name: value}
        elif section == "mixed_precision" and entry:
            wrong.append(f"overrides.{key}: mixed_precision is null; name a recipe, such as bf16_mixed, before")
    for name in keys.PRECISION if precision else ():
        found[f"mixed_precision.{name}"] = precision[name]
        if name in keys.VALUES["model"]:
            found[f"model.{name}"] = precision[name]
    return wrong


def _derive(found: dict, complete: bool) -> None:
    """Fill in what Megatron derives from other settings. Changes `found`."""

    def fill(key: str, value) -> None:
        if found.get(key) is None and value is not None:
            found[key] = value

    if complete:
        for size in ("tensor", "pipeline"):
            fill(f"model.{size}_model_parallel_size", 1)
        for size in ("context_parallel_size", "expert_model_parallel_size"):
            fill(f"model.{size}", 1)
        ep, tp = found["model.expert_model_parallel_size"], found["model.tensor_model_parallel_size"]
        fill("model.expert_tensor_parallel_size", 1 if ep > 1 else tp)
    pattern = found.get("model.hybrid_layer_pattern")
    if isinstance(pattern, str):
        fill("model.num_layers", len(_main(pattern).replace("|", "")))
    hidden, heads = found.get("model.hidden_size"), found.get("model.num_attention_heads")
    fill("model.ffn_hidden_size", 4 * hidden if hidden else None)
    fill("model.num_query_groups", heads)
    fill("model.kv_channels", hidden // heads if hidden and heads else None)
    if found.get("model.num_moe_experts"):
        fill("model.moe_ffn_hidden_size", found.get("model.ffn_hidden_size"))
    fill("validation.eval_global_batch_size", found.get("train.global_batch_size"))
    fill("validation.eval_micro_batch_size", found.get("train.micro_batch_size"))


def _main(pattern: str) -> str:
    """The layers of a hybrid pattern without those that predict further tokens."""
    return pattern.split("/")[0]


def capability(gpu: str) -> float | None:
    """CUDA compute capability of a type of GPU, found in names such as h100, NVIDIA-H100-80GB-HBM3; None if unknown."""
    words = re.split(r"[^a-z0-9]+", gpu.lower())
    return next((CAPABILITY[word] for word in words if word in CAPABILITY), None)


def _summary(known: dict, resources: dict) -> str:
    nodes, each, gpu = resources["nodes"], resources["gpus_per_node"], resources.get("gpu")
    parts = [f"{nodes} x {each} {gpu or 'GPUs'}"]
    at = _Layout(known, nodes * each, gpu, "", None)
    sizes = {name: at[key] for name, key in SIZES.items() if at.experts or name not in ("EP", "ETP")}
    parts.append(" ".join(f"{name} {size}" for name, size in (sizes | {"DP": at.data}).items() if size and size > 1))
    if at.data and at.batch and at.micro and at.batch % (at.data * at.micro) == 0:
        parts.append(f"batch {at.batch} as {at.data} x {at.micro} x {at.batch // (at.data * at.micro)}")
    if known.get("model.fp4"):
        parts.append(str(known.get("model.fp4_recipe")))
    elif known.get("model.fp8"):
        parts.append(f"fp8 {known.get('model.fp8_recipe')}")
    return ", ".join(part for part in parts if part)


SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
}


class _Layout:
    """Settings under short names; None for what is not known."""

    def __init__(self, known: dict, world: int, gpu: str | None, kind: str, pack: int | None):
        self.known, self.world, self.kind, self.pack = known, world, kind, pack
        self.gpu, self.capability = gpu, capability(gpu) if gpu else None
        self.tp, self.pp, self.cp, self.ep, self.etp, self.vpp = (known.get(f"model.{key}") for key in SIZES.values())
        self.batch, self.micro = known.get("train.global_batch_size"), known.get("train.micro_batch_size")
        self.pattern = known.get("model.hybrid_layer_pattern")
        self.sequence_parallel = bool(known.get("model.sequence_parallel")) and (self.tp or 1) > 1
        self.fsdp = bool(known.get("ddp.use_megatron_fsdp") or known.get("dist.use_megatron_fsdp"))

    def __getitem__(self, key: str):
        return self.known.get(f"model.{key}")

    def has(self, letter: str) -> bool:
        """Whether the model has a layer of this kind; of a model without a pattern, attention."""
        return letter in _main(self.pattern) if self.pattern else letter == "*"

    @property
    def experts(self) -> int:
        """Experts of the layers that have them; 0 without such layers."""
        count = self["num_moe_experts"] or 0
        return count if not self.pattern or self.has("E") else 0

    @property
    def model_size(self) -> int | None:
        return self.tp * self.pp * self.cp if self.tp and self.pp and self.cp else None

    @property
    def data(self) -> int | None:
        """Data parallel size; None where it is not a whole number."""
        size = self.model_size
        return self.world // size if size and self.world % size == 0 else None


def problems(settings: dict, world: int, gpu: str | None, kind: str, pack: int | None) -> list[str]:
    """What is impossible about these settings on `world` GPUs of type `gpu`, in sentences that name what is possible.

    settings: as the function of this name returns them; what is missing is not checked. pack: tokens of a packed row,
    for kind `sft`.
    """
    layout = _Layout(settings, world, gpu, kind, pack)
    sizes = list(_sizes(layout))
    if sizes:  # nothing can be divided by a size that is no size
        return sizes
    checks = (
        _world,
        _experts,
        _batches,
        _heads,
        _context,
        _mamba,
        _width,
        _length,
        _pipeline,
        _precision,
        _fsdp,
        _loss,
        _speed,
    )
    return [problem for each in checks for problem in each(layout)]


def _multiples(value: int, of: int) -> str:
    """The nearest multiples, smaller and greater."""
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)


def _divisors(value: int, *of: int) -> str:
    """The nearest common divisors of `of`, smaller and greater than `value`."""
    common = math.gcd(*of)
    all_of_them = [n for n in range(1, common + 1) if common % n == 0]
    near = [n for n in all_of_them if n < value][-1:] + [n for n in all_of_them if n > value][:1]
    return " or ".join(map(str, near))


def _sizes(at: _Layout) -> Iterator[str]:
    for name, key in SIZES.items():
        size = at[key]
        if size is not None and (type(size) is not int or size < 1):
            yield f"model.{key}: {size!r}: {name} must be 1 or more"
    for key in ("train.global_batch_size", "train.micro_batch_size", "model.seq_length", "model.num_attention_heads"):
        value = at.known.get(key)
        if value is not None and (type(value) is not int or value < 1):
            yield f"{key}: {value!r}: must be 1 or more"


def _world(at: _Layout) -> Iterator[str]:
    size = at.model_size
    if size and at.world % size:
        yield (
            f"resources: {at.world} GPUs cannot hold TP {at.tp} x PP {at.pp} x CP {at.cp} = {size}; "
            f"{_multiples(at.world, size)} GPUs can"
        )
    if at.vpp and at.pp == 1:
        yield (
            f"model.virtual_pipeline_model_parallel_size: {at.vpp}: needs a pipeline; write null or a "
            "model.pipeline_model_parallel_size of 2 or more"
        )
    instances = at.known.get("ddp.num_distributed_optimizer_instances") or 1
    if at.data and at.cp and (at.data * at.cp) % instances:
        yield (
            f"ddp.num_distributed_optimizer_instances: {instances}: must divide DP x CP = {at.data * at.cp}; "
            f"{_divisors(instances, at.data * at.cp)} does"
        )


def _experts(at: _Layout) -> Iterator[str]:
    experts, kind = at.experts, at["moe_token_dispatcher_type"]
    if at["moe_flex_dispatcher_backend"] == "ncclep" and kind not in (None, "flex"):
        yield "model.moe_flex_dispatcher_backend: ncclep needs model.moe_token_dispatcher_type: flex"
    if at.ep and at.etp and at.pp and at.world % (at.ep * at.etp * at.pp):
        size = at.ep * at.etp * at.pp
        near = f"{_multiples(at.world, size)} GPUs can"
        if experts and at.world % at.pp == 0:
            near += f", or EP {_divisors(at.ep, experts, at.world // at.pp)}"
        yield f"resources: {at.world} GPUs cannot hold EP {at.ep} x ETP {at.etp} x PP {at.pp} = {size}; {near}"
    if at["hidden_size"] and not at["num_moe_experts"]:
        if at.ep and at.ep > 1:
            yield f"model.expert_model_parallel_size: {at.ep}: the model has no experts; write 1"
        for name in EXPERTS_ONLY:
            if at[name]:
                yield f"model.{name}: {at[name]}: the model has no experts; leave it out"
        return
    if at.ep and experts and experts % at.ep:
        yield (
            f"model.expert_model_parallel_size: {at.ep}: must divide the {experts} experts; "
            f"{_divisors(at.ep, experts)} does"
        )
    if not experts:
        return
    if at.tp and at.tp > 1 and not at.sequence_parallel:
        yield (
            f"model.sequence_parallel: Megatron trains experts with TP {at.tp} only with sequence parallelism; "
            "write true, or model.tensor_model_parallel_size: 1"
        )
    topk = at["moe_router_topk"]
    if topk and topk > experts:
        yield f"model.moe_router_topk: {topk}: the model has {experts} experts"
    groups, chosen = at["moe_router_num_groups"], at["moe_router_group_topk"]
    if chosen and not groups:
        yield "model.moe_router_num_groups: must be given where model.moe_router_group_topk is"
    elif chosen and experts % groups:
        near = _divisors(groups, experts)
        yield f"model.moe_router_num_groups: {groups}: must divide the {experts} experts; {near} does"
    elif chosen and chosen > groups:
        yield f"model.moe_router_group_topk: {chosen}: there are {groups} groups"
    yield from _dispatcher(at)


def _dispatcher(at: _Layout) -> Iterator[str]:
    kind, backend = at["moe_token_dispatcher_type"], at["moe_flex_dispatcher_backend"]
    kinds = ("allgather", "alltoall", "flex")
    if kind is not None and kind not in kinds:
        yield f"model.moe_token_dispatcher_type: {kind!r}: must be one of {', '.join(kinds)}"
    if kind == "flex":
        if backend not in DISPATCHERS:
            yield f"model.moe_flex_dispatcher_backend: {backend!r}: must be one of {', '.join(DISPATCHERS)}"
        elif at.capability:
            least, most, names = DISPATCHERS[backend]
            unfit = backend == "deepep" and re.search(r"gb[23]00", (at.gpu or "").lower())
            if unfit or not least <= at.capability <= most:
                yield (
                    f"model.moe_flex_dispatcher_backend: {backend} runs on {names}, not on {at.gpu}; write "
                    "model.moe_token_dispatcher_type: alltoall"
                )
        if backend in ("deepep", "ncclep") and at.etp and at.ep and at.etp * at.ep == 1:
            yield (
                f"model.moe_flex_dispatcher_backend: {backend} needs experts on several GPUs, here EP and ETP are 1; "
                "write model.moe_token_dispatcher_type: alltoall"
            )
    if at["moe_shared_expert_overlap"] and at["moe_shared_expert_intermediate_size"] and kind == "allgather":
        yield "model.moe_shared_expert_overlap: needs model.moe_token_dispatcher_type alltoall or flex; write false"
    factor, balancing = at["moe_expert_capacity_factor"], at["moe_router_load_balancing_type"]
    if factor is not None:
        fit = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}
        kinds_of = balancing if isinstance(balancing, list) else [balancing]
        if balancing is not None and set(kinds_of) - fit:
            yield (
                f"model.moe_expert_capacity_factor: {factor}: needs a moe_router_load_balancing_type of "
                f"{', '.join(sorted(fit))}"
            )
    if at["moe_pad_expert_input_to_capacity"]:
        if factor is None:
            yield "model.moe_pad_expert_input_to_capacity: needs model.moe_expert_capacity_factor; write false"
        elif kind == "flex" and backend == "deepep":
            yield "model.moe_pad_expert_input_to_capacity: the dispatcher deepep cannot; write false"
    coefficient = at["moe_aux_loss_coeff"]
    if isinstance(balancing, list) and not (isinstance(coefficient, list) and len(coefficient) == len(balancing)):
        yield f"model.moe_aux_loss_coeff: {coefficient!r}: must be a list of {len(balancing)}, one for each kind"


def _batches(at: _Layout) -> Iterator[str]:
    data = at.data
    if not data:
        return
    if at.batch and at.micro and at.batch % (at.micro * data):
        share = at.micro * data
        yield (
            f"train.global_batch_size: {at.batch}: must be a multiple of micro batch {at.micro} x DP {data} = {share}"
            f"; {_multiples(at.batch, share)} is{_fitting_world(at)}"
        )
    evaluated, micro = (at.known.get(f"validation.eval_{name}_batch_size") for name in ("global", "micro"))
    ways = data * at.cp // (at.known.get("dist.eval_context_parallel_size") or at.cp)
    own = evaluated != at.batch or micro != at.micro or ways != data
    if evaluated and micro and own and ways and evaluated % (micro * ways):
        yield (
            f"validation.eval_global_batch_size: {evaluated}: must be a multiple of micro batch {micro} x DP {ways} = "
            f"{micro * ways}; {_multiples(evaluated, micro * ways)} is"
        )
    if at.vpp and at.pp and at.batch and at.micro and at.batch % (at.micro * data) == 0:
        steps = at.batch // (at.micro * data)
        group = at["microbatch_group_size_per_vp_stage"] or at.pp
        if not at.pp <= group <= steps or 0 < steps % group < at.pp:
            yield (
                f"train.global_batch_size: {at.batch}: with VPP the {steps} micro batches of a rank must be a multiple "
                f"of {group}; {_multiples(at.batch, at.micro * data * group)} makes them one"
            )


def _fitting_world(at: _Layout) -> str:
    """On how many GPUs, near to those there are, the batch can be divided."""
    rows = at.batch // at.micro
    if at.batch % at.micro:
        return ""
    experts = at.ep * at.etp * at.pp if at.experts and at.ep and at.etp else 1
    fit = [n * at.model_size for n in range(1, rows + 1) if rows % n == 0 and n * at.model_size % experts == 0]
    near = [n for n in fit if n < at.world][-1:] + [n for n in fit if n > at.world][:1]
    return f", or use {' or '.join(map(str, near))} GPUs" if near else ""


def _heads(at: _Layout) -> Iterator[str]:
    heads, groups = at["num_attention_heads"], at["num_query_groups"]
    if not at.tp or not heads:
        return
    if heads % at.tp:
        yield (
            f"model.tensor_model_parallel_size: {at.tp}: must divide the {heads} attention heads; "
            f"{_divisors(at.tp, heads)} does"
        )
    if groups and groups % at.tp and at.tp % groups:
        near = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        near = [n for n in near if n < at.tp][-1:] + [n for n in near if n > at.tp][:1]
        yield (
            f"model.tensor_model_parallel_size: {at.tp}: must divide the {groups} groups of keys and values or be a "
            f"multiple; {' or '.join(map(str, near))} is"
        )


def _context(at: _Layout) -> Iterator[str]:
    """How keys and values travel between the pieces of a sequence."""
    kinds = at["cp_comm_type"] or "p2p"
    if not at.cp:
        return
    if isinstance(kinds, list) and at.cp > 1 and at["num_layers"] and len(kinds) != at["num_layers"]:
        yield f"model.cp_comm_type: has {len(kinds)} entries for {at['num_layers']} layers"
    kinds = kinds if isinstance(kinds, list) else [kinds]
    levels = at["hierarchical_context_parallel_sizes"]
    if "a2a+p2p" in kinds and levels is None:
        yield "model.hierarchical_context_parallel_sizes: must be given with cp_comm_type a2a+p2p: two factors of CP"
    if levels is not None and math.prod(levels) != at.cp:
        yield f"model.hierarchical_context_parallel_sizes: {levels}: their product must be CP, {at.cp}"
    heads, groups = at["num_attention_heads"], at["num_query_groups"]
    if "a2a" in kinds and at.cp > 1 and heads and groups and at.tp and not heads % at.tp:
        own, shared = heads // at.tp, max(groups // at.tp, 1)
        if own % at.cp or shared % at.cp:
            yield (
                f"model.cp_comm_type: a2a deals the heads of a rank over CP {at.cp}, and a rank has {own} heads and "
                f"{shared} groups; write p2p"
            )


def _mamba(at: _Layout) -> Iterator[str]:
    if not at.pattern or not at.has("M") or not at.tp:
        return
    groups, heads = at["mamba_num_groups"], at["mamba_num_heads"]
    if heads is None and at["hidden_size"] and at["mamba_head_dim"]:
        heads = 2 * at["hidden_size"] // at["mamba_head_dim"]  # Mamba-2's expansion of 2
    if not groups or not heads:
        return
    if heads % groups:
        near = _divisors(groups, heads)
        yield f"model.mamba_num_groups: {groups}: must divide the {heads} heads of Mamba; {near} does"
    if heads % at.tp or groups % at.tp:
        yield (
            f"model.tensor_model_parallel_size: {at.tp}: must divide the {heads} heads and {groups} groups of Mamba; "
            f"{_divisors(at.tp, heads, groups)} does"
        )
        return
    if at.cp and at.cp > 1:
        own_heads, own = heads // at.tp, groups // at.tp

        def fits(cp: int) -> bool:
            return own_heads % cp == 0 and (cp % own == 0 if own < cp else own % cp == 0)

        if not fits(at.cp):
            near = [n for n in range(1, own_heads + 1) if fits(n)]
            near = [n for n in near if n < at.cp][-1:] + [n for n in near if n > at.cp][:1]
            yield (
                f"model.context_parallel_size: {at.cp}: must divide the {own_heads} heads of Mamba on a rank (with TP "
                f"{at.tp}) and its {own} groups, or be their multiple; {' or '.join(map(str, near))} does"
            )
    if at["fp8"] and at["mamba_state_dim"] and at["mamba_head_dim"]:
        width = 2 * heads * at["mamba_head_dim"] + 2 * groups * at["mamba_state_dim"] + heads
        if width % 16:
            yield f"model.fp8: the input projection of Mamba has {width} outputs, which must be a multiple of 16"


def _width(at: _Layout) -> Iterator[str]:
    """Rows and columns of matrices over TP and ETP, and in low precision."""
    if not at.tp:
        return
    kinds = [
        ("ffn_hidden_size", at.tp, "TP", (at.has("-") if at.pattern else not at.experts)),
        ("moe_ffn_hidden_size", at.etp or at.tp, "ETP", bool(at.experts)),
        ("moe_shared_expert_intermediate_size", at.tp, "TP", bool(at.experts)),
        ("vocab_size", at.tp, "TP", True),
    ]
    step = 1
    if at["fp4"]:
        step = STEP["fp4"]
    elif at["fp8"]:
        step = STEP["mxfp8" if at["fp8_recipe"] == "mxfp8" else "fp8"]
    for key, ways, name, used in kinds:
        width = at[key]
        if not used or not width:
            continue
        low = 1 if key == "vocab_size" else step  # the output layer stays in high precision
        if width % (ways * low):
            why = f"{name} {ways}" + (f" x {low} for this precision" if low > 1 else "")
            yield f"model.{key}: {width}: must be a multiple of {why}; {_multiples(width, ways * low)} is"
    if step > 1 and at["hidden_size"] and at["hidden_size"] % step:
        yield (
            f"model.hidden_size: {at['hidden_size']}: must be a multiple of {step} for this precision; "
            f"{_multiples(at['hidden_size'], step)} is"
        )


def _length(at: _Layout) -> Iterator[str]:
    length = at.pack if at.kind == "sft" and at.pack else at["seq_length"]
    key = "data.pack_size" if at.kind == "sft" and at.pack else "model.seq_length"
    if at.kind == "sft" and at.pack and at["seq_length"] not in (None, at.pack):
        yield f"model.seq_length: {at['seq_length']}: differs from data.pack_size, {at.pack}; leave it out"
    if not length or not at.cp or not at.tp:
        return
    step = math.lcm(2 * at.cp if at.cp > 1 else 1, at.cp * at.tp if at.sequence_parallel else 1)
    if length % step:
        parts = [f"2 x CP {at.cp}"] * (at.cp > 1) + [f"CP {at.cp} x TP {at.tp}"] * at.sequence_parallel
        yield f"{key}: {length}: must be a multiple of {' and '.join(parts)}; {_multiples(length, step)} is"
    if at.kind == "sft":
        if at.cp > 1 and at["calculate_per_token_loss"] is False:
            yield "model.calculate_per_token_loss: must be true for an SFT with context parallelism"
        if at.cp > 1 and at.known.get("ddp.average_in_collective"):
            yield "ddp.average_in_collective: must be false for an SFT with context parallelism"
        padded = (at.known.get("dataset.dataset_kwargs") or {}).get("pad_to_max_length")
        steady = padded and at.known.get("dataset.offline_packing_specs.pad_cu_seqlens")
        if at["cuda_graph_impl"] in ("transformer_engine", "full_iteration") and not steady:
            yield (
                f"model.cuda_graph_impl: {at['cuda_graph_impl']}: packed rows differ in how many sequences they have, "
                "and graphs need the same number always; write none"
            )
        if at.micro and at.micro > 1:
            yield f"train.micro_batch_size: {at.micro}: packed rows are trained on one at a time; write 1"


def _pipeline(at: _Layout) -> Iterator[str]:
    layers = at["num_layers"]
    if at.pattern:
        yield from _hybrid(at, layers)
        return
    if not at.pp or not layers:
        return
    first, last = at["num_layers_in_first_pipeline_stage"], at["num_layers_in_last_pipeline_stage"]
    counted = [at["account_for_embedding_in_pipeline_split"], at["account_for_loss_in_pipeline_split"]]
    plan = at["pipeline_model_parallel_layout"]
    if any(counted) and (first is not None or last is not None):
        yield (
            "model.num_layers_in_first_pipeline_stage: cannot be combined with account_for_embedding_in_pipeline_split "
            "or account_for_loss_in_pipeline_split"
        )
    elif plan is not None:
        if first is not None or last is not None or any(counted):
            yield "model.pipeline_model_parallel_layout: cannot be combined with the other settings of the layout"
        else:
            yield from _planned(at, plan, layers)
    elif first is not None or last is not None:
        yield from _uneven(at, layers, first, last)
    else:
        slots = layers + sum(map(bool, counted))
        what = f"{layers} layers" + (f" and {slots - layers} counted besides" if slots > layers else "")
        if slots % at.pp:
            yield (
                f"model.pipeline_model_parallel_size: {at.pp}: must divide the {what}; {_divisors(at.pp, slots)} does, "
                "or lay them out by model.pipeline_model_parallel_layout"
            )
        elif at.vpp and slots // at.pp % at.vpp:
            yield (
                f"model.virtual_pipeline_model_parallel_size: {at.vpp}: must divide the {slots // at.pp} layers of a "
                f"rank; {_divisors(at.vpp, slots // at.pp)} does"
            )


def _uneven(at: _Layout, layers: int, first: int | None, last: int | None) -> Iterator[str]:
    ends = [(key, n) for key, n in (("first", first), ("last", last)) if n is not None]
    left, stages = layers - sum(n for _, n in ends), at.pp - len(ends)
    for name, n in ends:
        if n <= 0:
            yield f"model.num_layers_in_{name}_pipeline_stage: {n}: must be 1 or more"
        elif at.vpp and n % at.vpp:
            yield f"model.num_layers_in_{name}_pipeline_stage: {n}: must be a multiple of VPP {at.vpp}"
    if left < 0 or bool(left) != bool(stages) or (stages > 0 and left % stages) or stages < 0:
        yield (
            f"model.num_layers_in_{ends[0][0]}_pipeline_stage: leaves {left} of {layers} layers for the other {stages} "
            "stages, which cannot be divided evenly"
        )
    elif stages and at.vpp and left // stages % at.vpp:
        yield f"model.virtual_pipeline_model_parallel_size: {at.vpp}: must divide the {left // stages} layers of a rank"


def _planned(at: _Layout, plan, layers: int) -> Iterator[str]:
    """A layout given as text such as Ettt|(tt|)*29,m|L, or as lists of kinds of layer."""
    key = "model.pipeline_model_parallel_layout"
    if isinstance(plan, str):
        text = re.sub(r"\(([^)]+)\)\*(\d+)", lambda m: m[1] * int(m[2]), plan.replace(",", ""))
        stages: list = re.sub(r"(.)\*(\d+)", lambda m: m[1] * int(m[2]), text).split("|")
        kinds = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
        if unknown := sorted(set("".join(stages)) - set(kinds)):
            yield f"{key}: {plan!r}: {', '.join(unknown)}: letters are E, t, m and L, stages are divided by |"
            return
        stages = [[kinds[letter] for letter in stage] for stage in stages]
    else:
        stages = [[str(kind).strip().lower() for kind in stage] for stage in plan]
    flat = [kind for stage in stages for kind in stage]
    counts = {kind: flat.count(kind) for kind in flat}
    if at.pp == 1 and len(stages) > 1:
        yield f"{key}: has {len(stages)} stages, and there is no pipeline; write null, or PP {len(stages)}"
    elif len(stages) % at.pp:
        yield f"{key}: has {len(stages)} stages; PP {at.pp} needs {_multiples(len(stages), at.pp)}"
    elif at.vpp and at.vpp != len(stages) // at.pp:
        yield f"{key}: has {len(stages) // at.pp} stages for each rank, and VPP is {at.vpp}; leave VPP out"
    if not flat or flat[0] != "embedding" or flat[-1] != "loss" or counts["embedding"] != 1 or counts["loss"] != 1:
        yield f"{key}: must begin with the only E and end with the only L"
    if counts.get("decoder", 0) != layers:
        yield f"{key}: has {counts.get('decoder', 0)} of {layers} layers"
    further = at["mtp_num_layers"] or 0
    ordered = "mtp" not in flat or "decoder" not in flat[flat.index("mtp") :]
    holders = [n for n, stage in enumerate(stages) if "mtp" in stage]
    late = all(n >= len(stages) - at.pp and (n % at.pp or len(stages) == at.pp) for n in holders)
    if counts.get("mtp", 0) != further or not ordered or len(holders) > 1 or not late:
        yield f"{key}: the {further} layers that predict further tokens (m) must be together in one of the last stages"
    if set(counts) - {"embedding", "decoder", "mtp", "loss"}:
        yield f"{key}: has kinds of layer other than embedding, decoder, mtp and loss"


def _hybrid(at: _Layout, layers: int | None) -> Iterator[str]:
    """Pipeline stages of a hybrid model: even, or divided by | in the pattern."""
    key, main = "model.hybrid_layer_pattern", _main(at.pattern)
    if unknown := sorted(set(main) - set("MG*D+-E|")):
        yield f"{key}: {', '.join(unknown)}: layers are M (Mamba), * (attention), E (experts), - (MLP), G, D or +"
        return
    if "*" in main and ("D" in main or "+" in main):
        yield f"{key}: cannot have both * and {'D' if 'D' in main else '+'}"
    further = at.pattern.split("/")[1:]
    if len(set(further)) > 1:
        yield f"{key}: the parts after / must be the same"
    elif set("".join(further)) - set("MG*D+-E"):
        yield f"{key}: what stands after / must be layers only"
    count = len(main.replace("|", ""))
    if layers is not None and layers != count:
        yield f"model.num_layers: {layers}: the pattern has {count}; write {count}"
    if at.has("E") and not at["num_moe_experts"]:
        yield f"{key}: has layers with experts (E), and model.num_moe_experts is not given"
    if at.vpp:
        yield (
            "model.virtual_pipeline_model_parallel_size: Megatron-Bridge does not support it for hybrid models; "
            "write null"
        )
    if at["pipeline_model_parallel_layout"] is not None:
        yield "model.pipeline_model_parallel_layout: a hybrid model is laid out by | in model.hybrid_layer_pattern"
    if not at.pp:
        return
    first, last = at["num_layers_in_first_pipeline_stage"], at["num_layers_in_last_pipeline_stage"]
    stages = main.count("|") + 1
    if stages > 1:
        if first is not None or last is not None:
            yield f"{key}: | already says which stage has which layers; leave num_layers_in_..._pipeline_stage out"
        if stages != at.pp:
            # Megatron itself builds the first PP stages alone, without a word, where there are more
            yield f"{key}: | makes {stages} stages, and PP is {at.pp}; they must be the same number"
    elif first is not None or last is not None:
        yield from _uneven(at, count, first, last)
    elif count % at.pp:
        yield (
            f"model.pipeline_model_parallel_size: {at.pp}: must divide the {count} layers; {_divisors(at.pp, count)} "
            f"does, or say where stages end by | in {key}"
        )
    parts = main.split("|") if stages > 1 else []
    if stages == 1 and first is None and last is None and count % at.pp == 0:
        parts = [main[i : i + count // at.pp] for i in range(0, count, count // at.pp)]
    if at.has("E") and at.pp > 1 and (poor := [n for n, part in enumerate(parts, 1) if "E" not in part]):
        # Megatron-Core gathers the router's losses of all stages in tensors of different lengths, and hangs
        yield f"{key}: pipeline stage {poor[0]} has no layer with experts (E), and each needs one; move it by |"
    counted = [name for name in ("embedding", "loss") if at[f"account_for_{name}_in_pipeline_split"]]
    for name in counted:
        yield f"model.account_for_{name}_in_pipeline_split: a hybrid model is laid out by | in {key}; write false"


def _precision(at: _Layout) -> Iterator[str]:
    fp8, fp4, recipe = at["fp8"], at["fp4"], at["fp8_recipe"]
    if at["bf16"] and at["fp16"]:
        yield "model.fp16: cannot be combined with model.bf16; set one of them to false"
    if fp8 and fp4:
        yield "mixed_precision.fp4: cannot be combined with mixed_precision.fp8; set one of them to null"
    has = at.capability
    if has and at["bf16"] and has < 8:
        yield f"model.bf16: {at.gpu} cannot compute in bfloat16; write mixed_precision: fp16_mixed"
    if fp8 and recipe in FP8:
        least, most, names = FP8[recipe]
        if has and not least <= has <= most:
            fit = [name for name, (low, high, _) in FP8.items() if low <= has <= high]
            way = f"it can compute {' and '.join(fit)}" if fit else "it has no FP8: write mixed_precision: bf16_mixed"
            yield f"mixed_precision.fp8_recipe: {recipe} needs {names}, not {at.gpu}; {way}"
    elif fp8 and recipe is not None and recipe != "custom":
        yield f"mixed_precision.fp8_recipe: {recipe!r}: must be one of {', '.join(FP8)}"
    if fp4 and has and has < 10:
        yield f"mixed_precision.fp4: {at['fp4_recipe']} needs Blackwell (b200, b300, gb200, gb300), not {at.gpu}"
    if fp8 and at["first_last_layers_bf16"] and recipe == "delayed":
        yield "mixed_precision.first_last_layers_bf16: delayed scaling keeps no layers in BF16; write false"
    if fp8 and at["first_last_layers_bf16"] and at["num_layers"] and at.pp:
        most = at["num_layers"] // at.pp
        for where in ("start", "end"):
            kept = at[f"num_layers_at_{where}_in_bf16"]
            if kept is not None and not 0 <= kept <= most:
                yield (
                    f"mixed_precision.num_layers_at_{where}_in_bf16: {kept}: a pipeline stage has {most} layers; "
                    f"write {most} or fewer"
                )
    gather, reuse = (
        at.known.get(f"mixed_precision.{name}") for name in ("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag")
    )
    if gather and at.known.get("mixed_precision.fp8_recipe") == "mxfp8" and not reuse and not at.fsdp:
        yield "mixed_precision.reuse_grad_buf_for_mxfp8_param_ag: must be true with mxfp8 and fp8_param_gather"


def _fsdp(at: _Layout) -> Iterator[str]:
    form = at.known.get("checkpoint.ckpt_format")
    if form not in (None, "torch_dist", "fsdp_dtensor"):
        yield f"checkpoint.ckpt_format: {form}: must be torch_dist, or fsdp_dtensor with Megatron FSDP"
    if not at.fsdp:
        if form == "fsdp_dtensor":
            yield "checkpoint.ckpt_format: fsdp_dtensor needs ddp.use_megatron_fsdp: true; leave it out"
        return
    if form not in (None, "fsdp_dtensor"):
        yield f"checkpoint.ckpt_format: {form}: Megatron FSDP needs fsdp_dtensor"
    if at.known.get("dist.use_torch_fsdp2"):
        yield "dist.use_torch_fsdp2: cannot be combined with ddp.use_megatron_fsdp"
    if at.known.get("dist.use_tp_pp_dp_mapping"):
        yield "dist.use_tp_pp_dp_mapping: cannot be combined with ddp.use_megatron_fsdp"
    if at.known.get("ddp.fsdp_manual_registration") and not at.known.get("ddp.nccl_ub"):
        yield "ddp.fsdp_manual_registration: needs ddp.nccl_ub: true"
    sharded = at.known.get("ddp.data_parallel_sharding_strategy") == "optim_grads_params"
    if sharded and at.known.get("train.check_weight_hash_across_dp_replicas_interval") is not None:
        yield "train.check_weight_hash_across_dp_replicas_interval: weights are sharded by FSDP; leave it out"
    if str(at.known.get("env_vars.CUDA_DEVICE_MAX_CONNECTIONS")) == "1":
        yield "env_vars.CUDA_DEVICE_MAX_CONNECTIONS: must be more than 1 with FSDP"


def _loss(at: _Layout) -> Iterator[str]:
    """Where the result would depend on what is outside a stage's identity: the micro batch size and the layout."""
    masked = at.known.get("dataset.eod_mask_loss") and at["calculate_per_token_loss"] is False
    if at.kind == "pretrain" and masked and at.micro and at.micro > 1:
        yield (
            f"train.micro_batch_size: {at.micro}: with dataset.eod_mask_loss the loss depends on it, unless "
            "model.calculate_per_token_loss is true; write 1 or that"
        )
    if not at.experts:
        return
    balancing, coefficient = at["moe_router_load_balancing_type"], at["moe_aux_loss_coeff"]
    kinds = balancing if isinstance(balancing, list) else [balancing]
    counts = coefficient if isinstance(coefficient, list) else [coefficient] * len(kinds)
    used = {kind for kind, weight in zip(kinds, counts, strict=False) if weight or kind == "sinkhorn"}
    batchwise = used & {"aux_loss", "sinkhorn"}
    if batchwise and at.micro and at.micro > 1:
        yield (
            f"train.micro_batch_size: {at.micro}: the experts are balanced over a micro batch "
            f"({', '.join(sorted(batchwise))}), so the result depends on its size; write 1, or "
            "model.moe_router_load_balancing_type: seq_aux_loss"
        )
    if at["moe_expert_capacity_factor"] is not None:
        apart = [f"micro batch {at.micro}"] * bool(at.micro and at.micro > 1)
        apart += [f"{name} {size}" for name, size in (("TP", at.tp), ("CP", at.cp)) if size and size > 1]
        if apart:
            yield (
                f"model.moe_expert_capacity_factor: {at['moe_expert_capacity_factor']}: which tokens are dropped "
                f"depends on {' and '.join(apart)}; write 1 for each, or null for no dropping"
            )


def _speed(at: _Layout) -> Iterator[str]:
    """Recomputation, offloading and overlap that do not go together."""
    granularity, method, layers = (at[f"recompute_{name}"] for name in ("granularity", "method", "num_layers"))
    modules = at["recompute_modules"] or []
    if granularity == "full":
        if method not in ("block", "uniform"):
            yield f"model.recompute_method: {method!r}: full recomputation needs block or uniform"
        if layers is None:
            yield "model.recompute_num_layers: must be given with full recomputation"
        if at["cuda_graph_impl"] in ("local", "transformer_engine"):
            yield "model.cuda_graph_impl: full recomputation goes with none or full_iteration; write none"
    elif granularity == "selective" and layers is not None:
        yield "model.recompute_num_layers: must be null with selective recomputation"
    elif granularity not in (None, "selective"):
        yield f"model.recompute_granularity: {granularity!r}: must be null, selective or full"
    if granularity == "selective" and "moe_act" in modules and at["moe_grouped_gemm"] is False:
        yield "model.recompute_modules: moe_act needs model.moe_grouped_gemm: true"
    both = {"moe_act", "layernorm"} & set(modules)
    if granularity == "selective" and both and at["fp8"] and at["fp8_recipe"] == "delayed":
        yield f"model.recompute_modules: {' and '.join(sorted(both))} cannot be recomputed with delayed scaling"
    overlapped = at["moe_shared_expert_overlap"] and at["moe_shared_expert_intermediate_size"]
    if granularity == "selective" and "shared_experts" in modules and overlapped:
        yield "model.recompute_modules: shared_experts cannot be recomputed with model.moe_shared_expert_overlap"
    graphs = at["cuda_graph_impl"] not in (None, "none", "full_iteration")
    if at["cpu_offloading"] and ((at.pp or 1) > 1 or granularity is not None or graphs):
        yield "model.cpu_offloading: goes with neither pipelines, recomputation nor CUDA graphs of layers; write false"
    if at.known.get("comm_overlap.overlap_moe_expert_parallel_comm"):
        yield from _overlapped(at, granularity, method, layers, modules)


def _overlapped(at: _Layout, granularity, method, layers, modules: list[str]) -> Iterator[str]:
    key = "comm_overlap.overlap_moe_expert_parallel_comm"
    wrong = [
        ("EP 2 or more", (at.ep is not None and at.ep < 2) or (bool(at["hidden_size"]) and not at.experts)),
        ("a pipeline with VPP", bool(at.pp and at.pp > 1 and not at.vpp)),
        ("the dispatcher alltoall or flex", at["moe_token_dispatcher_type"] == "allgather"),
        ("bf16 or fp16", at["bf16"] is False and not at["fp16"]),
        ("no full recomputation", granularity == "full" or method is not None or layers is not None),
        ("no recomputation of moe", "moe" in modules),
        ("model.moe_shared_expert_overlap: false", bool(at["moe_shared_expert_overlap"])),
        ("one layer at most that predicts further tokens", (at["mtp_num_layers"] or 0) > 1),
    ]
    if missing := [what for what, is_wrong in wrong if is_wrong]:
        yield f"{key}: needs {', '.join(missing)}; or write false"
