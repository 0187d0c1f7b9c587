"""The network: tokens to logits, forward and backward."""
