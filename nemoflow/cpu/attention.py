"""Attention for packed rows without Transformer Engine."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention


class PackedDotProductAttention(DotProductAttention):
    """Megatron-Core's own attention, which refuses packed rows, with packed rows.

    In a packed row (`packed_seq_params` given, "thd" layout) query is (t, heads, d), key and value (t, groups, d) for t
    positions of all sequences one after another; a position sees itself and the earlier ones of its own sequence.
    Returns (t, heads * d). Everything else is left to the parent.
    """

    def forward(self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs):
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        borders = packed_seq_params.cu_seqlens_q_padded
        borders = packed_seq_params.cu_seqlens_q if borders is None else borders
        position = torch.arange(query.shape[0])
        sequence = torch.searchsorted(borders.to(position.dtype), position, right=True)
        mask = (sequence[:, None] == sequence[None, :]) & (position[:, None] >= position[None, :])
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
        dropout = self.attention_dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=self.softmax_scale, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)
