"""Write the test models as GGUF files for llama.cpp: `python bench/peers/gguf_models.py --out FOLDER`.

The weights are those of `plait.build(config, seed=0)`, so that both sides multiply the very same numbers. BF16 is
written here, through the `gguf` package; Q8_0 and Q4_0 are made from it by llama.cpp's own llama-quantize. Left to
itself it holds the head of a Q4_0 model in Q6_K; the file that is called pure holds every matrix in Q4_0. There is no
tokenizer inside: llama-bench feeds random ids.

The BitNet of 2B4T sizes becomes TQ2_0 (its embedding and head Q6_K), with weights of its own, SiLU for squared ReLU and
no sub-norms: llama.cpp runs no others.
"""

import argparse
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor

from plait.cli.benches.frozen import drawn
from plait.cli.benches.shapes import MODELS, as_llama
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP

# ending of the file's name -> words for llama-quantize
QUANTIZED = {"q8_0": ("Q8_0",), "q4_0": ("Q4_0",), "q4_0-pure": ("Q4_0", "--pure")}
TERNARY = {"tq2_0": ("TQ2_0",)}


def tensors(config: ModelConfig, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their names and layouts for our weights, in the order of the layers."""
    yield "token_embd.weight", weights["embed.weight"]
    yield "output_norm.weight", weights["norm.weight"]
    if not config.ties_embeddings:
        yield "output.weight", weights["head.weight"]
    is_llama = config.family == "llama"
    for i, spec in enumerate(config.layers):
        mine = {name.removeprefix(f"blocks.{i}."): t for name, t in weights.items() if name.startswith(f"blocks.{i}.")}
        # their Llama's layer is attention and feed-forward together
        at = f"blk.{i // 2 if is_llama else i}"
        norm = "ffn_norm" if is_llama and isinstance(spec, MLP) else "attn_norm"
        yield f"{at}.{norm}.weight", mine["norm.weight"]
        match spec:
            case Mamba2():
                yield from _of_mamba2(at, spec, mine)
            case Attention():
                yield from _of_attention(at, spec, mine)
            case MLP():
                if spec.gated:
                    yield f"{at}.ffn_gate.weight", mine["mixer.gate_proj.weight"]
                yield f"{at}.ffn_up.weight", mine["mixer.up_proj.weight"]
                yield f"{at}.ffn_down.weight", mine["mixer.down_proj.weight"]


def _of_mamba2(at: str, spec: Mamba2, mine: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield f"{at}.ssm_in.weight", mine["mixer.in_proj.weight"]
    yield f"{at}.ssm_conv1d.weight", mine["mixer.conv.weight"].float()
    yield f"{at}.ssm_conv1d.bias", mine["mixer.conv.bias"]
    yield f"{at}.ssm_dt.bias", mine["mixer.dt_bias"]
    yield f"{at}.ssm_a", -mine["mixer.A_log"].exp()[:, None]
    yield f"{at}.ssm_d", mine["mixer.D"][:, None]
    yield f"{at}.ssm_norm.weight", mine["mixer.norm.weight"].view(spec.n_groups, -1).float()
    yield f"{at}.ssm_out.weight", mine["mixer.out_proj.weight"]


def _of_attention(at: str, spec: Attention, mine: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs, heads in (("q_proj", "attn_q", spec.n_heads), ("k_proj", "attn_k", spec.n_kv_heads)):
        w = mine[f"mixer.{ours}.weight"]
        if spec.rope is not None:
            # they rotate neighbours, we rotate halves
            w = w.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).reshape(w.shape)
        yield f"{at}.{theirs}.weight", w
    yield f"{at}.attn_v.weight", mine["mixer.v_proj.weight"]
    yield f"{at}.attn_output.weight", mine["mixer.o_proj.weight"]


def write(config: ModelConfig, path: Path) -> None:
    """Write one model in BF16: matrices in bfloat16, vectors and the convolution in float32."""
    arch = "llama" if config.family == "llama" else "nemotron_h"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(config.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.d_model)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_layer_norm_eps(config.norm_eps)
    if arch == "llama":
        _head_of_llama(writer, config)
    else:
        _head_of_hybrid(writer, config)
    is_large = config.recipe == "ternary"
    weights = dict((drawn(config, "bf16") if is_large else build(config, seed=0)).state_dict())
    for name, t in tensors(config, weights):
        is_matrix = t.dim() == 2 and not any(part in name for part in ("ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm"))
        if is_matrix:
            bits = t.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, t.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _head_of_llama(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    attention, mlp = config.layers[:2]
    assert isinstance(attention, Attention) and isinstance(mlp, MLP) and attention.rope is not None
    writer.add_block_count(len(config.layers) // 2)
    writer.add_feed_forward_length(mlp.d_ff)
    writer.add_head_count(attention.n_heads)
    writer.add_head_count_kv(attention.n_kv_heads)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_freq_base(attention.rope.base)


def _head_of_hybrid(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    mamba = next(spec for spec in config.layers if isinstance(spec, Mamba2))
    attention = next(spec for spec in config.layers if isinstance(spec, Attention))
    writer.add_block_count(len(config.layers))
    # a layer without key/value heads and without feed-forward is a recurrent one
    writer.add_head_count(attention.n_heads)
    writer.add_head_count_kv([spec.n_kv_heads if isinstance(spec, Attention) else 0 for spec in config.layers])
    writer.add_feed_forward_length([spec.d_ff if isinstance(spec, MLP) else 0 for spec in config.layers])
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_ssm_conv_kernel(mamba.conv_width)
    writer.add_ssm_inner_size(mamba.d_inner)
    writer.add_ssm_state_size(mamba.d_state)
    writer.add_ssm_time_step_rank(mamba.n_heads)
    writer.add_ssm_group_count(mamba.n_groups)


def main() -> None:
    """Read the arguments, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas between")
    parser.add_argument("--quantize", type=Path, help="llama.cpp's llama-quantize: also write Q8_0 and Q4_0")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.models.split(","):
        path = given.out / f"{name}-bf16.gguf"
        aside = path.with_suffix(".tmp")
        config = as_llama(MODELS[name])
        write(config, aside)
        aside.replace(path)
        print(path, f"{path.stat().st_size / 1e6:,.0f} MB")
        kinds = TERNARY if config.recipe == "ternary" else QUANTIZED
        for ending, (kind, *options) in kinds.items() if given.quantize else ():
            made = given.out / f"{name}-{ending}.gguf"
            subprocess.run([str(given.quantize), *options, str(path), str(made), kind], check=True, capture_output=True)
            print(made, f"{made.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
