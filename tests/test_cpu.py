"""The device shim: its Mamba against transformers' and against the recurrence; packed rows that see only themselves."""

import os
import subprocess
import sys

import contracts
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoflow import cpu
from nemoflow.cpu import mamba
from nemoflow.errors import NemoflowError

pytest_plugins = ["megatron_fixtures"]


def recurrence(x, dt, A, B, C, D, state=None):
    """state[t] = exp(dt A) state[t-1] + dt x B, y = state C + D x: one position after another, as the paper has it."""
    repeat = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    state = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if state is None else state
    out = []
    for t in range(x.shape[1]):
        state = state * torch.exp(dt[:, t] * A)[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1), state


def scan_inputs(batch, length, heads, groups, dim=4, state=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, heads, dim, generator=g)
    dt = torch.rand(batch, length, heads, generator=g)
    A = -torch.rand(heads, generator=g) - 0.1
    B, C = (torch.randn(batch, length, groups, state, generator=g) for _ in range(2))
    return x, dt, A, B, C, torch.randn(heads, generator=g)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 100),
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    heads_of_a_group=st.integers(1, 3),
    chunk=st.sampled_from([1, 7, 32, 128]),
    seed=st.integers(0, 99),
)
def test_the_scan_is_the_recurrence(length, batch, groups, heads_of_a_group, chunk, seed):
    x, dt, A, B, C, D = scan_inputs(batch, length, groups * heads_of_a_group, groups, seed=seed)
    start = torch.randn(batch, groups * heads_of_a_group, 4, 3, generator=torch.Generator().manual_seed(seed))
    y, final = mamba.mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk, D=D, initial_states=start, return_final_states=True
    )
    expected, state = recurrence(x, dt, A, B, C, D, start)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(final, state, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_packed_row_is_its_sequences_one_by_one(lengths, seed):
    heads, dim, groups, state, width = 4, 4, 2, 3, 4
    inner = heads * dim
    g = torch.Generator().manual_seed(seed)
    row = torch.randn(1, sum(lengths), 2 * inner + 2 * groups * state + heads, generator=g)
    conv = torch.randn(inner + 2 * groups * state, width, generator=g)
    bias = torch.randn(inner + 2 * groups * state, generator=g)
    dt_bias, D = torch.randn(2, heads, generator=g)
    A = -torch.rand(heads, generator=g) - 0.1

    def layer(part, seq_idx=None):
        return mamba.mamba_split_conv1d_scan_combined(
            part, conv, bias, dt_bias, A, D, 128, seq_idx=seq_idx, headdim=dim, ngroups=groups
        )

    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    alone = torch.cat([layer(part) for part in row.split(lengths, 1)], 1)
    torch.testing.assert_close(layer(row, index), alone, atol=1e-4, rtol=1e-4)


def test_the_scan_agrees_with_transformers():
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=32,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        conv_kernel=4,
        chunk_size=16,
        use_mamba_kernels=False,
    )
    mixer = NemotronHMamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        hidden = torch.randn(2, 75, 32)
        expected = mixer.torch_forward(hidden)
        projected = mixer.in_proj(hidden)
        y = mamba.mamba_split_conv1d_scan_combined(
            F.pad(projected[..., 64:], (64, 0), value=30.0),  # the gate is wide open: here it belongs to the norm
            mixer.conv1d.weight.squeeze(1),
            mixer.conv1d.bias,
            mixer.dt_bias,
            -torch.exp(mixer.A_log.float()),
            mixer.D,
            128,
            headdim=8,
            ngroups=2,
        )
        norm = mamba.RMSNorm(64, eps=mixer.norm.variance_epsilon, group_size=32, norm_before_gate=False)
        norm.weight.copy_(mixer.norm.weight)
        got = mixer.out_proj(norm(y / 30.0, projected[..., :64]))
    assert expected.std() > 0.01
    assert (got - expected).abs().max() <= 1e-4


def hybrid(pattern: str):
    """A provider of a small NemotronH model."""
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.core.activations import squared_relu
    from megatron_fixtures import MODEL

    settings = {key.removeprefix("model."): value for key, value in MODEL.items()}
    settings |= {"hybrid_layer_pattern": pattern, "num_layers": len(pattern)}
    return HybridModelProvider(
        **settings,
        vocab_size=128,
        activation_func=squared_relu,
        bf16=False,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_router_dtype="fp32",
    )


def transformer():
    """A provider of a small Qwen3 model."""
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 128}
    config = AutoConfig.for_model("qwen3", architectures=["Qwen3ForCausalLM"], num_attention_heads=2, **small)
    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    provider.bf16, provider.params_dtype, provider.autocast_dtype = False, torch.float32, torch.float32
    provider.seq_length, provider.num_query_groups, provider.init_method_std = 64, 1, 0.2
    return provider


def packed_logits(pattern: str) -> dict:
    """In a fork that has Megatron."""
    provider = transformer() if pattern == "transformer" else hybrid(pattern)
    cpu.adapt_model(provider)
    return contracts.packed_logits(provider)


@pytest.mark.parametrize("pattern", ["M", "*", "ME*M", "transformer"])
def test_packed_sequences_cannot_see_each_other(server, pattern):
    found = server.call("test_cpu:packed_logits", pattern)
    assert found["outside"] <= 1e-5
    assert found["inside"] > 1e-3, "the change must be visible where it was made"
    assert found["outside_unpacked"] > 1e-4, "and would be seen elsewhere, were the row not packed"
    assert found["alone"] <= 1e-4


@pytest.mark.parametrize(("wish", "answer"), [("0", False), ("1", True)])
def test_an_explicit_wish_decides(monkeypatch, wish, answer):
    monkeypatch.setenv("NEMOFLOW_CPU", wish)
    assert cpu.needed.__wrapped__() is answer


def test_an_unclear_wish_is_refused(monkeypatch):
    monkeypatch.setenv("NEMOFLOW_CPU", "yes")
    with pytest.raises(NemoflowError, match="NEMOFLOW_CPU=yes: must be 1"):
        cpu.needed.__wrapped__()


def test_cuda_by_name_is_the_cpu():
    code = """
import torch
from nemoflow import cpu
cpu.enable()
assert torch.ones(2, device="cuda").cuda().to("cuda:0").device.type == "cpu"
assert torch.empty(2, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
assert not torch.cuda.is_available(), "code that asks must take its own path"
before = torch.cuda.get_rng_state()
a = torch.rand(3)
torch.cuda.set_rng_state(before)
assert torch.equal(torch.rand(3), a)
with torch.cuda.stream(torch.cuda.Stream()) as _:
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
import mamba_ssm, causal_conv1d
assert (mamba_ssm.__version__, causal_conv1d.__version__) >= ("2.0.0", "1.4.0")
import importlib.util
assert importlib.util.find_spec("mamba_ssm") is not None
print(torch.get_num_threads())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(cpu.THREADS)], "the number of threads must not follow from the surroundings"
