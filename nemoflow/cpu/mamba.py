"""Mamba-2 in plain PyTorch: what Megatron-Core's training path calls of `mamba_ssm`, with the same signatures.

The kernels of `mamba_ssm` are Triton programs and need a GPU. These are the same sums written with tensor operations,
in float32, differentiable by autograd. Shapes use b batch, l length, h heads, p head dimension, g groups of r heads,
n state dimension, c chunks, q positions of a chunk. The algorithm is the block decomposition of state-space duality in
Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

import torch
import torch.nn.functional as F

CHUNK = 32
"""Longest chunk. The result does not depend on it; the work grows with it, and a CPU has no tiles to fill."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over groups of `group_size` features, gated by silu(z) before or after it.

    Stands for `mamba_ssm.ops.triton.layernorm_gated.RMSNorm`: x and z (..., hidden_size); returns x's shape and dtype.
    """

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.norm_before_gate = norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x, z=None):
        dtype, x = x.dtype, x.float()
        if z is not None and not self.norm_before_gate:
            x = x * F.silu(z.float())
        groups = x.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        x = groups.flatten(-2) * self.weight.float()
        if z is not None and self.norm_before_gate:
            x = x * F.silu(z.float())
        return x.to(dtype)


def causal_conv(x, weight, bias=None, seq_idx=None):
    """Depthwise causal convolution, y[t] = bias + sum_k weight[:, k] x[t - (w - 1) + k].

    x (b, l, d), weight (d, w), bias (d) or None. With `seq_idx` (b, l), the number of the packed sequence each position
    belongs to, taps that would reach into another sequence count as zero.
    """
    length, width = x.shape[1], weight.shape[1]
    if seq_idx is None:
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=width - 1, groups=x.shape[2])
        return y[..., :length].transpose(1, 2)
    y = x * weight[:, -1]
    for back in range(1, width):
        earlier = F.pad(x, (0, 0, back, 0))[:, :length]
        same = F.pad(seq_idx, (back, 0), value=-1)[:, :length] == seq_idx
        y = y + earlier * same[..., None] * weight[:, width - 1 - back]
    return y if bias is None else y + bias


def _decay(log_decay):
    """exp of the sum of `log_decay` (..., q) over j < k <= i, as a lower triangular matrix (..., q, q) over (i, j)."""
    total = log_decay.cumsum(-1)
    difference = total[..., :, None] - total[..., None, :]
    lower = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).tril()
    return difference.masked_fill(~lower, float("-inf")).exp()


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
):
    """The selective scan: state[t] = exp(dt A) state[t-1] + dt B x, y[t] = C state[t] + D x, for every head.

    x (b, l, h, p), dt (b, l, h), A (h), B and C (b, l, g, n), D (h) or (h, p), z like x, dt_bias (h),
    initial_states (b, h, p, n), seq_idx (b, l). Returns y (b, l, h, p), and the final states (b, h, p, n) if asked.
    A packed row (seq_idx) is computed as one chunk whose decay is zero between sequences, so no state crosses a border.
    """
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise NotImplementedError("states at the ends of a packed row belong to no single sequence")
    dtype, length, groups = x.dtype, x.shape[1], B.shape[2]
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    q = length if seq_idx is not None else min(chunk_size, CHUNK, length)

    def chunked(t, *dims):
        """(b, l, h or g, ...) -> (b, c, q, g, r, ...), the last chunk filled with zeros, in the order `dims`."""
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, -length % q)).unflatten(1, (-1, q))
        return t.unflatten(3, (groups, -1)).permute(dims).contiguous()

    step = chunked(x.float() * dt[..., None], 0, 1, 3, 4, 2, 5)  # b c g r q p, with h = g r heads
    log_decay = chunked(dt * A.float(), 0, 1, 3, 4, 2)  # b c g r q
    B, C = (chunked(t.float(), 0, 1, 3, 4, 2, 5) for t in (B, C))  # b c g 1 q n
    within = _decay(log_decay)
    if seq_idx is not None:
        within = within * (seq_idx[:, :, None] == seq_idx[:, None, :])[:, None, None, None]
    y = (C @ B.transpose(-1, -2) * within) @ step

    final = None
    if seq_idx is None:
        total = log_decay.cumsum(-1)
        to_end = (total[..., -1:] - total).exp()[..., None]
        states = B.transpose(-1, -2) @ (step * to_end)  # b c g r n p, what each chunk adds
        if initial_states is None:
            first = torch.zeros_like(states[:, :1])
        else:
            first = initial_states.float().unflatten(1, (groups, -1)).transpose(-1, -2)[:, None]
        between = _decay(F.pad(total[..., -1].movedim(1, -1), (1, 0)))  # b g r c+1 c+1
        states = torch.einsum("bgrzc,bcgrnp->bzgrnp", between, torch.cat([first, states], 1))
        states, final = states[:, :-1], states[:, -1].transpose(-1, -2).flatten(1, 2)
        y = y + (C @ states) * total.exp()[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + x.float() * (D.float() if D.dim() == 2 else D.float()[:, None])
    if z is not None:
        y = y * F.silu(z.float())
    y = y.to(dtype)
    return (y, final) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,  # noqa: ARG001 - part of the signature; the norm itself is refused below
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,  # noqa: ARG001 - as rmsnorm_eps
):
    """Split z, x, B, C, dt from one projection, convolve (x, B, C), scan, gate by z: the inside of a Mamba-2 layer.

    zxbcdt (b, l, 2 h p + 2 g n + h), conv1d_weight (h p + 2 g n, w), D (h) with `headdim` given, or D (h, p).
    Returns y (b, l, h p), and the final states if asked.
    """
    if rmsnorm_weight is not None or outproj_weight is not None or outproj_bias is not None:
        raise NotImplementedError("norm and output projection are separate modules in Megatron-Core")
    if activation not in ("silu", "swish"):
        raise NotImplementedError(f"activation {activation!r}: Mamba-2 uses silu")
    heads = D.shape[0]
    headdim = headdim or D.shape[1]
    inner = heads * headdim
    state = (zxbcdt.shape[-1] - 2 * inner - heads) // (2 * ngroups)
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * ngroups * state, heads], -1)
    xbc = F.silu(causal_conv(xbc, conv1d_weight, conv1d_bias, seq_idx))
    x, B, C = xbc.split([inner, ngroups * state, ngroups * state], -1)
    out = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, state)),
        C.unflatten(-1, (ngroups, state)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, headdim)),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    return (out[0].flatten(-2), out[1]) if return_final_states else out.flatten(-2)
