"""Generation over a cache of keys and values: main.py has the calls."""

from perceiver_ar.generation.main import Step, evaluation_mode, generate, prompt_rows, stream

__all__ = ["Step", "evaluation_mode", "generate", "prompt_rows", "stream"]
