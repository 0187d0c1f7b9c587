"""Networks by size, and those of published implementations, as settings that differ from the defaults."""

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    # The demo's network, 4M parameters: what learned best within minutes on two CPU cores.
    "laptop": {"context_length": 1024, "num_latents": 128, "dim": 256, "num_layers": 4, "num_heads": 2},
    # 315M parameters, for a GPU with 24 GB or more and hours of training. Not measured yet.
    "gpu": {"context_length": 8192, "num_latents": 1024, "dim": 1024, "num_layers": 24, "num_heads": 16},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    # What learned best at equal time in our measurements.
    "default": {},
    # Hawthorne et al. 2022 as released in google-research/perceiver-ar, rotary form (arXiv 2202.07765, appendix).
    "paper": {
        "local_context": 1,
        "qk_norm": False,
        "activation": "relu2",
        "attention_bias": True,
        "out_bias": "all",
        "mlp_bias": True,
        "logits_bias": True,
        "query_proj": True,
        "rotary_fraction": 0.5,
        "rotary_base": None,
        "rotary_endpoint": True,
        "prefix_dropout": 0.15,
        "init": "fan_in",
    },
    # perceiver-ar-pytorch 0.0.10 with its default head size 64; `compat.lucidrains` fills in the rest.
    "lucidrains": {
        "local_context": 1,
        "head_dim": 64,
        "qk_norm": False,
        "activation": "gelu",
        "out_bias": "cross",
        "final_norm": False,
        "rotary_fraction": 0.5,
        "position_table": "learned",
        "latent_keys": "query",
        "mask_self_attention": False,
        "init": "torch",
    },
    # perceiver-io's causal language model (krasserm) with its defaults.
    "krasserm": {
        "local_context": 1,
        "qk_norm": False,
        "activation": "gelu",
        "out_bias": "cross",
        "final_norm": False,
        "tie_embeddings": True,
        "logits_bias": True,
        "rotary_fraction": 0.5,
        "rotary_layers": 1,
        "position_table": "learned",
        "latent_keys": "query",
        "prefix_dropout": 0.5,
        "init": "normal",
    },
}
PRESETS = SIZES | PUBLISHED
