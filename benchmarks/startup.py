"""The other side of the start-up comparison: transformers, from process start to one finished step.

The network is configs/research_300k.py's; 16 rows of 256 tokens.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=1024, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=160, max_position_embeddings=256,
    )
)  # fmt: skip
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4)
tokens = torch.randint(0, 1024, (16, 257))
logits = model(tokens[:, :-1]).logits
loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 1024), tokens[:, 1:].reshape(-1))
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimiser.step()
print(f"first step finished, loss {loss.item():.4f}", flush=True)
