"""Data: files -> codec -> token file -> windows. Knows nothing of the model."""
