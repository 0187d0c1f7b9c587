import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    values, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, float("-inf")).scatter_(-1, ids, values)


def sample(logits: Tensor, temperature: float = 1.0) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(-1)
