"""A long prompt is read in pieces of constant memory, and the pieces change nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.model.sizes import FAMILIES

from plait.engine.runner import prefill
from plait.model.hybrid import build
from plait.report import Report


@pytest.mark.parametrize("chunk", [1, 37, 64, 333, 1000])
@pytest.mark.parametrize("family", ["hybrid", "mamba", "llama", "partial rope"])
def test_a_prompt_in_pieces_equals_the_whole_prompt(family: str, chunk: int) -> None:
    model = build(FAMILIES[family], recipe="fp32", seed=1)
    n = 401 if chunk > 1 else 50
    prompts = [torch.randint(0, 37, (n - less,)).tolist() for less in (0, 1, 40)]
    with torch.inference_mode():
        for batch in (prompts, prompts[:1]):
            whole = torch.cat([model(torch.tensor([p]), n_logits=1).logits[:, 0] for p in batch])
            cache = model.cache(len(batch), capacity=n)
            pieces = prefill(model, batch, cache, chunk)
            torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
            # and the next token sees the same past
            ids = torch.tensor([[5]] * len(batch))
            after = model(ids, cache=cache).logits[:, 0]
            longer = torch.cat([model(torch.tensor([[*p, 5]]), n_logits=1).logits[:, 0] for p in batch])
            torch.testing.assert_close(after, longer, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_bench_of_long_prompts_runs_at_a_small_size(tmp_path: Path) -> None:
    bench = Path(__file__).resolve().parents[2] / "bench" / "long.py"
    words = ["--tokens", "700", "--chunk", "64", "--check", "300", "--d-model", "128"]
    subprocess.run([sys.executable, bench, *words, "--save", tmp_path / "long.jsonl"], check=True, timeout=250)
    facts = {fact.name: fact.value for fact in Report.load_jsonl(tmp_path / "long.jsonl").facts}
    assert facts["logits and states finite"] is True
    # one layer, one head of 32, bfloat16; 8 tokens were drawn and fed after the prompt
    assert facts["kv"] == 2 * 2 * 32 * 708
    assert "resident less KV at 640" in facts
