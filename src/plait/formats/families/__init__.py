"""The model families of Hugging Face folders, by the `model_type` of their config.json."""

from plait.formats.families import llama, mamba2, nemotron_h

FAMILIES = {
    row.name: row for row in (nemotron_h.FAMILY, mamba2.FAMILY, llama.LLAMA, llama.QWEN2, llama.QWEN3, llama.BITNET)
}
