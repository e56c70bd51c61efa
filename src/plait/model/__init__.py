"""A model is a pattern of layers: tokens in, logits out."""
