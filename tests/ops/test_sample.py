"""Sampling without sorting keeps what sorting keeps, draws what the engine's sampler draws, and draws it as often."""

import math
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from plait.engine.request import Sampling
from plait.engine.sampler import filtered, uniform
from plait.kernels.triton import tuning
from plait.kernels.triton.sample import sample_ids as kernel
from plait.ops.dispatch import use
from plait.ops.sample import kept_logits, sample_ids, uniform_numbers

SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=1),
    Sampling(top_k=5, temperature=1.3),
    Sampling(top_p=0.01),
    Sampling(top_p=0.9, temperature=0.8),
    Sampling(min_p=0.05),
    Sampling(min_p=1.0),
    Sampling(top_k=40, top_p=0.95, min_p=0.02, temperature=0.6),
    Sampling(temperature=0),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.DEFAULTS, "sample", {"BLOCK": 256, "num_warps": 4})


def tensors(settings: list[Sampling]) -> dict[str, Tensor]:
    return {
        "temperature": torch.tensor([float(s.temperature) for s in settings]),
        "top_k": torch.tensor([s.top_k or 0 for s in settings], dtype=torch.int32),
        "top_p": torch.tensor([1.0 if s.top_p is None else s.top_p for s in settings]),
        "min_p": torch.tensor([s.min_p or 0.0 for s in settings]),
    }


def run_kernel(logits: Tensor, u: Tensor, settings: list[Sampling]) -> tuple[Tensor, Tensor]:
    """Ids, and which logits were kept."""
    how = tensors(settings)
    ids, floor = kernel(logits, u, how["temperature"], how["top_k"], how["top_p"], how["min_p"])
    x = logits.float() / how["temperature"].masked_fill(how["temperature"] == 0, 1.0)[:, None]
    return ids, (x >= floor[:, None]) & (x > -math.inf)


@pytest.mark.parametrize("s", SETTINGS[:-1], ids=str)
def test_the_reference_keeps_what_the_engines_sampler_keeps(s: Sampling) -> None:
    logits = torch.randn(6, 700) * 3
    logits[1] = logits[1].bfloat16().float()  # many equal ones
    logits[2, 100:] = -math.inf
    assert torch.equal(kept_logits(logits, **tensors([s] * 6)), filtered(logits, s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_keeps_and_draws_what_sorting_does(dtype: torch.dtype) -> None:
    settings = SETTINGS
    logits = (torch.randn(len(settings), 700) * 3).to(dtype)
    logits[3::4, 300:] = -math.inf
    u = torch.rand(len(settings), dtype=torch.float64)
    ids, kept = run_kernel(logits, u, settings)
    sampled = torch.tensor([s.temperature > 0 for s in settings])
    exact = kept_logits(logits, **tensors(settings)) > -math.inf
    assert torch.equal(kept[sampled], exact[sampled])
    with use("reference"):
        assert torch.equal(ids, sample_ids(logits, u, **tensors(settings)))


def test_random_settings_and_sizes(n_shapes: int) -> None:
    for seed in range(n_shapes):
        random.seed(seed)
        torch.manual_seed(seed)
        V = random.choice([1, 2, 255, 256, 257, random.randint(3, 1500)])
        settings = [
            Sampling(
                temperature=random.choice([1.0, random.uniform(0.1, 3)]),
                top_k=random.choice([None, 1, random.randint(1, 2 * V)]),
                top_p=random.choice([None, random.uniform(0.05, 0.999)]),
                min_p=random.choice([None, random.random() / 4]),
            )
            for _ in range(2)
        ]
        logits = torch.randn(2, V) * random.choice([0.5, 4, 20])
        if random.random() < 0.3:
            logits = logits.to(random.choice([torch.float16, torch.bfloat16]))
        u = torch.rand(2, dtype=torch.float64)
        ids, kept = run_kernel(logits, u, settings)
        assert torch.equal(kept, kept_logits(logits, **tensors(settings)) > -math.inf), f"seed {seed}: {settings}"
        assert all(kept[row, i] for row, i in enumerate(ids)), f"seed {seed}"
        with use("reference"):
            exact = sample_ids(logits, u, **tensors(settings))
        # float32 sums of a block may put a number that lies at an edge on its other side
        assert (ids == exact).sum() >= (2 if V < 1000 else 1), f"seed {seed}: {ids} {exact}"


def test_every_token_is_drawn_as_often_as_its_probability_says() -> None:
    n, s = 60, Sampling(temperature=1.5, top_p=0.9)
    logits = (torch.randn(12) * 2).expand(n, 12)
    # random numbers, one from every n-th of the interval: a token's share of them is its probability but for its ends
    u = (torch.arange(n) + torch.rand(n, dtype=torch.float64)) / n
    ids, _ = run_kernel(logits, u[torch.randperm(n)], [s] * n)
    p = filtered(logits[:1], s).softmax(-1)[0].double()
    counts = ids.bincount(minlength=12)
    assert (counts[p == 0] == 0).all()
    assert ((counts - n * p).abs() <= 2).all()


def test_ends_of_the_interval_choose_the_first_and_the_last_kept_token() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -5.0, 2.0, -9.0]]).repeat(2, 1)
    u = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    ids, _ = run_kernel(logits, u, [Sampling(top_k=2)] * 2)
    assert ids.tolist() == [1, 3]


def test_equals_at_the_edge_of_top_k_count_once_for_the_mass_of_top_p() -> None:
    # of two tokens the first holds 0.88; of all eight that stay together it would hold 0.51, and 0.6 would need more
    logits, s = torch.tensor([[3.0] + [1.0] * 7]), Sampling(top_k=2, top_p=0.6)
    _, kept = run_kernel(logits, torch.zeros(1, dtype=torch.float64), [s])
    assert kept[0].tolist() == [True] + [False] * 7
    assert torch.equal(kept, filtered(logits, s) > -math.inf)


def test_the_first_of_equals_is_greedy_and_what_is_no_number_is_told() -> None:
    rows = [[1.0, 3.0, 3.0], [1.0, math.nan, 0.0], [math.inf, 0.0, 1.0], [-math.inf] * 3]
    logits, u = torch.tensor(rows), torch.zeros(4, dtype=torch.float64)
    for s, expected in ((Sampling(temperature=0), [1, -1, 0, 0]), (Sampling(), [0, -1, -1, -1])):
        ids, _ = run_kernel(logits, u, [s] * 4)
        assert ids.tolist() == expected
        with use("reference"):
            assert sample_ids(logits, u, **tensors([s] * 4)).tolist() == expected


def test_numbers_are_those_of_the_engine() -> None:
    cases = [(0, 0), (1, 5), (2**63 - 1, 77), (2**64 - 1, 3), (123456789, 10**6)]
    seeds = torch.tensor([seed - (1 << 64) if seed >> 63 else seed for seed, _ in cases])
    got = uniform_numbers(seeds, torch.tensor([position for _, position in cases]))
    assert got.tolist() == [uniform(seed, position) for seed, position in cases]


@pytest.mark.gpu
@pytest.mark.parametrize("V", [255, 50257, 131072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_gpu_it_keeps_and_draws_what_sorting_does(V: int, dtype: torch.dtype) -> None:
    settings = SETTINGS * 3
    logits = (torch.randn(len(settings), V) * 3).to(dtype)
    logits[3::4, V // 2 :] = -math.inf
    u = torch.rand(len(settings), dtype=torch.float64)
    how = tensors(settings)
    found = sample_ids(logits.cuda(), u.cuda(), **{name: t.cuda() for name, t in how.items()}).cpu()
    greedy = torch.tensor([s.temperature == 0 for s in settings])
    assert torch.equal(found[greedy], logits.float().argmax(-1)[greedy])
    # sums in another order move the edge of top-p, and of the drawn interval, by roundings of their 1e5 terms
    kept = kept_logits(logits, **how | {"top_p": (how["top_p"] + 1e-4).clamp(max=1)})
    p = kept.double().softmax(-1)
    below, mine = p.cumsum(-1), found[:, None]
    assert (p.gather(1, mine)[~greedy] > 0).all()
    high = below.gather(1, mine)[:, 0]
    low = high - p.gather(1, mine)[:, 0]
    assert ((u > low - 2e-4) & (u < high + 2e-4))[~greedy].all()


@pytest.mark.gpu
def test_on_the_gpu_every_token_is_drawn_as_often_as_it_should() -> None:
    s, n = Sampling(top_k=9, top_p=0.9, temperature=0.8), 1 << 14
    row = (torch.randn(1, 12) * 2).bfloat16()
    u = (torch.arange(n) + torch.rand(n, dtype=torch.float64)) / n
    how = {name: t.cuda() for name, t in tensors([s] * n).items()}
    counts = sample_ids(row.expand(n, 12).cuda(), u.cuda(), **how).cpu().bincount(minlength=12)
    p = filtered(row.float(), s).softmax(-1)[0].double()
    assert (counts[p == 0] == 0).all() and ((counts - n * p).abs() <= 3).all()


@pytest.mark.gpu
def test_on_the_gpu_what_is_no_number_is_told() -> None:
    rows = [[1.0, 3.0, 3.0], [1.0, math.nan, 0.0], [math.inf, 0.0, 1.0], [-math.inf] * 3]
    u = torch.zeros(4, dtype=torch.float64)
    for s, expected in ((Sampling(temperature=0), [1, -1, 0, 0]), (Sampling(), [0, -1, -1, -1])):
        how = {name: t.cuda() for name, t in tensors([s] * 4).items()}
        assert sample_ids(torch.tensor(rows).cuda(), u.cuda(), **how).tolist() == expected
