"""Rotary embedding against complex rotation, and its scalings against transformers' tables."""

import pytest
import torch

from plait.ops.rope import Rope, inverse_frequencies, rotate


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    x, positions = torch.randn(2, 9, 3, 16), torch.randint(0, 500, (2, 9))
    w, temperature = inverse_frequencies(Rope(base=10000.0), 16)
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double())
    turned = turned * torch.polar(torch.ones(()).double(), positions[..., None].double() * w.double())[:, :, None]
    got = rotate(x, positions, w, temperature=temperature)
    torch.testing.assert_close(got.double(), torch.cat([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-4)


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    w, _ = inverse_frequencies(Rope(), 32)
    at = [(rotate(q, torch.tensor([[t + 5]]), w) * rotate(k, torch.tensor([[t]]), w)).sum() for t in (0, 3, 100)]
    torch.testing.assert_close(torch.stack(at), at[0].expand(3), rtol=1e-4, atol=1e-4)


def test_a_partial_rotation_leaves_the_rest() -> None:
    x = torch.randn(1, 4, 2, 16)
    w, _ = inverse_frequencies(Rope(rotated=0.5), 16)
    got = rotate(x, torch.arange(4)[None], w)
    assert torch.equal(got[..., 8:], x[..., 8:]) and not torch.equal(got[:, 1:, :, :8], x[:, 1:, :, :8])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Rope(base=1e6), {"rope_type": "default", "rope_theta": 1e6}),
        (Rope(scaling="linear", stretch=4.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        (
            Rope(base=5e5, scaling="llama3", stretch=8.0, original_context=8192, low=1.0, high=4.0),
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            Rope(base=1e6, scaling="yarn", stretch=4.0, original_context=32768, low=1.0, high=32.0),
            {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "beta_slow": 1.0,
                "beta_fast": 32.0,
                "original_max_position_embeddings": 32768,
            },
        ),
    ],
    ids=["default", "linear", "llama3", "yarn"],
)
def test_frequencies_equal_transformers(ours: Rope, theirs: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=131072, rope_parameters=theirs
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    w, temperature = inverse_frequencies(ours, 128)
    torch.testing.assert_close(w, rotary.inv_freq, rtol=1e-6, atol=0)
    assert temperature == pytest.approx(rotary.attention_scaling)


def test_an_odd_share_is_refused() -> None:
    with pytest.raises(ValueError, match="rope rotates 5 of 16"):
        inverse_frequencies(Rope(rotated=0.35), 16)
