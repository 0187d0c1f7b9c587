"""The networks of published implementations, as settings that differ from the defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
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
