"""Hugging Face transformers: after this import `AutoModelForCausalLM` and `AutoTokenizer` load runs.

Nothing is converted: a run's config.json and model.safetensors are read and written as they are.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from perceiver_ar.huggingface.caching import PerceiverARCache
from perceiver_ar.huggingface.configuration import PerceiverARModelConfig
from perceiver_ar.huggingface.export import export
from perceiver_ar.huggingface.modeling import PerceiverARForCausalLM
from perceiver_ar.huggingface.tokenizer import PerceiverARTokenizer, codec_tokenizer

AutoConfig.register(PerceiverARModelConfig.model_type, PerceiverARModelConfig, exist_ok=True)
AutoModelForCausalLM.register(PerceiverARModelConfig, PerceiverARForCausalLM, exist_ok=True)
AutoTokenizer.register(PerceiverARModelConfig, tokenizer_class=PerceiverARTokenizer, exist_ok=True)

__all__ = ["PerceiverARCache", "PerceiverARForCausalLM", "PerceiverARModelConfig", "codec_tokenizer", "export"]
