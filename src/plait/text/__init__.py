"""Text to token ids and back: tokenizers, their training, and chat templates."""
