"""Weights in eight bits for generation, by torchao: half of bfloat16's bytes to hold, and to read for every token."""

import logging

from torch import nn

from perceiver_ar.data.codec import missing_extra


def int8_weights(model: nn.Module) -> None:
    """Turns the weights of all linear layers into int8, in place: for each output the nearest of 255 equal steps.

    Everything else stays as it is, the embeddings and what is computed too, for which bfloat16 suits best. Compiled
    steps (`stream(..., compile=True)`) read int8; without a compiler every step makes the weights anew, which is slow.
    For use only: such weights cannot be trained or saved.

    Raises:
        InputError: torchao is not installed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that there are kernels for other devices
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise missing_extra("int8", error) from None
    finally:
        logging.disable(before)
    quantize_(model, Int8WeightOnlyConfig())
