"""From raw text to what trainers read.

    pretraining     source -> shards -> merge -> blend -> index
    SFT             source -> chats
    RL, DPO, RM     source -> prompts, preferences

and a tokenizer, trained on sources or given, for shards and chats. Each kind's module makes an artifact with
`make(payload, inputs, out, progress)`: `payload` is the frozen stage's payload with its defaults written out, `inputs`
the artifact directories by role, `out` the directory to write in, `progress` shows one line to the person; see
nemoflow.job.build for what else it may take and return. What is written is a pure function of payload and inputs, byte
for byte. Nothing here imports torch, transformers or Megatron.
"""
