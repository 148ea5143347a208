"""From raw text to what trainers read.

source (generate, local) -> tokenizer -> shards -> blend for pretraining, source -> chats for SFT, source -> prompts
for RL. Each module makes one kind of artifact with `make(payload, inputs, out, progress) -> measures`: `payload` is the
frozen stage's payload with its defaults written out, `inputs` the artifact directories by role, `out` an empty
directory, `progress` shows one line to the person. What is written is a pure function of payload and inputs, byte for
byte. Nothing here imports torch, transformers or Megatron.
"""
