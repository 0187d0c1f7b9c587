"""Int8 weights for generation, by torchao: half of bfloat16's bytes to hold, and to read for every token."""

from torch import nn

from perceiver_ar.data.codec import importing


def int8_weights(model: nn.Module) -> None:
    """Rounds the weights of all linear layers to int8, in place: 255 equal steps for each output.

    Embeddings and activations keep their dtype; bfloat16 suits best. Compiled steps (`stream(..., compile=True)`) read
    int8; others convert the weights back at every step, which is slow. Such weights cannot be trained or saved. Raises
    InputError if torchao is not installed.
    """
    with importing("int8"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model, Int8WeightOnlyConfig())
