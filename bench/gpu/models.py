"""Whole models with random weights: a decode step, a training step, and long prompts with short answers."""

import gc
import time
from dataclasses import replace
from statistics import median

import torch
from clock import Bench

from plait.engine.engine import Engine
from plait.engine.graph import Step
from plait.engine.request import Sampling
from plait.engine.runner import prefill
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, recipe_of
from plait.model.plan import decode_s, max_batch, needs, prefill_s, rate
from plait.model.static import StaticCache
from plait.precision.recipe import ALWAYS_FLOAT32
from plait.train.metrics import step_flops

HYBRID = "nemotron-h-8b"
# a prompt and some decode steps of a model, its weights drawn and its graph captured
COMPOSED_S = 40.0


@torch.no_grad()
def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, *, masters: bool = False) -> Hybrid:
    """A model whose weights are drawn where they lie: nothing of its size passes through the host."""
    with torch.device("meta"):
        model = Hybrid(config, recipe_of("bf16" if dtype == torch.bfloat16 else "fp32"))
    if not masters:
        for name, parameter in model.named_parameters():
            if not name.endswith(ALWAYS_FLOAT32):
                parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(1, 16).log_()
        elif name.endswith("dt_bias"):
            parameter.fill_(-4.0)
        elif name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() >= 2:
            parameter.normal_(0.0, config.init_std)
        else:
            parameter.fill_(1.0)
    return model


def free() -> None:
    """Return what is no longer used to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def at(model: Hybrid, batch: int, context: int, room: int) -> Step:
    """A decode step over a full cache of random contents."""
    cache = StaticCache(model.config, batch, context + room, device=model.device, dtype=model.recipe.compute)
    for state in cache.states:
        for t in () if state is None else state.tensors().values():
            for row in t:
                row.normal_(0.0, 0.1)
    return Step(model, cache)


def step_seconds(bench: Bench, step: Step, context: int, runs: int) -> list[float]:
    """Times of single steps at about this context, as they follow one another: weights are too large for any cache."""
    found: list[float] = []
    step.cache.lengths.fill_(context)
    step.run()
    for _ in range(3 if bench.setting.on_gpu else 1):
        step.cache.lengths.fill_(context)

        def several() -> None:
            for _ in range(runs):
                step.run()

        if bench.setting.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            several()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / runs)
        else:
            found.append(bench.seconds(several)[0] / runs)
    return found


@torch.inference_mode()
def decode_steps(bench: Bench) -> None:
    """The hybrid's decode step at batch 1, greedy and sampled, with and without a CUDA graph, beside its roofline."""
    s = bench.setting
    config, runs = s.models[HYBRID], 16 if s.on_gpu else 2
    model = random_model(config, s.device, s.dtype)
    n = needs(config, batch=1, context=s.step_context, width=torch.finfo(s.dtype).bits // 8)
    floor = decode_s(n, bench.machine)
    bench.report.add(f"{HYBRID} decode step: roofline", floor * 1e3, "ms")
    for mode, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        step = at(model, 1, s.step_context, 4 * runs)
        step.settings["temperature"].fill_(temperature)
        step.settings["top_k"].fill_(50 if temperature else 0)
        step.settings["top_p"].fill_(0.95 if temperature else 1.0)
        for graph in (False, True):
            if graph and s.on_gpu:
                step.capture()
            seconds = step_seconds(bench, step, s.step_context, runs)
            name = f"{HYBRID} decode step at {s.step_context}, {mode}, " + ("captured" if graph else "launched")
            bench.report.add(name, median(seconds) * 1e3, "ms", n=len(seconds))
            bench.report.add(f"{name}: times its roofline", median(seconds) / floor, "x")
        del step
    del model
    free()


def training(bench: Bench) -> None:
    """A training step of layers of the hybrid's shapes: share of the datasheet's bfloat16 peak, model FLOPs only."""
    s = bench.setting
    whole = s.models[HYBRID].to_dict()
    config = ModelConfig.from_dict({**whole, "pattern": s.train_pattern, "name": "part"})
    batch, length = s.train_shape
    while True:
        try:
            seconds = _train(bench, config, batch, length)
            break
        except torch.OutOfMemoryError:
            free()
            if batch == 1:
                raise
            batch //= 2
    tokens = batch * length
    flops = step_flops(config, tokens, batch * length * (length + 1) // 2)
    took = median(seconds)
    name = f"training step, {s.train_pattern} of {HYBRID}, {batch}x{length}"
    bench.report.add(name, took * 1e3, "ms", n=len(seconds))
    bench.report.add(f"{name}: speed", tokens / took, "tokens/s")
    bench.report.add(f"{name}: share of the datasheet's peak", flops / took / bench.datasheet_flops)
    free()


def _train(bench: Bench, config: ModelConfig, batch: int, length: int) -> list[float]:
    s = bench.setting
    model = random_model(config, s.device, s.dtype, masters=True)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(0, config.vocab_size, (batch, length), device=s.device)

    def run() -> None:
        loss = model(ids, labels=ids, n_logits=1).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return bench.seconds(run, captures=False)


@torch.inference_mode()
def long_prompts(bench: Bench, name: str) -> None:
    """Drawn tokens/s of long prompts and short answers at the batch that fits, and its share of the roofline.

    First composed: one prompt is read, a decode step is timed at the batch in the middle of the answers, and the whole
    would take batch x prompt + answer x step. Then the engine does the whole, if that is done before the time is up.
    """
    s, report = bench.setting, bench.report
    config, width = s.models[name], torch.finfo(s.dtype).bits // 8
    model = random_model(config, s.device, s.dtype)
    n = needs(config, batch=1, context=s.prompt, width=width, piece=s.piece)
    prompt_s = _prompt_seconds(bench, model)
    batch = max_batch(n.at(context=s.prompt + s.answer), bench.machine)
    each = n.kv_per_token * (s.prompt + s.answer) + n.ssm + n.conv
    if s.on_gpu:
        # by what is free now: the driver, the allocator and other programs have taken some; one more row is being read
        kept = (3 << 30) + each
        batch = min(batch, (torch.cuda.mem_get_info()[0] - kept) // each)
    batch = max(1, int(min(batch, s.most) if s.most else batch))
    middle = s.prompt + s.answer // 2
    step = at(model, batch, middle, s.answer - s.answer // 2)
    if s.on_gpu:
        step.capture()
    step_s = median(step_seconds(bench, step, middle, 4 if s.on_gpu else 1))
    del step
    free()
    label = f"{name}, {s.prompt} in / {s.answer} out"
    report.add(f"{label}: batch", batch)
    report.add(f"{label}: prompt", prompt_s, "s")
    report.add(f"{label}: prompt, share of its roofline", prefill_s(n, bench.machine) / prompt_s)
    report.add(f"{label}: decode step", step_s * 1e3, "ms")
    at_batch = replace(n, batch=batch, context=middle)
    report.add(f"{label}: decode step, share of its roofline", decode_s(at_batch, bench.machine) / step_s)
    estimate = batch * prompt_s + s.answer * step_s
    drawn, how = batch * s.answer / estimate, "composed of one prompt and one step"
    report.add(f"{label}: drawn, composed of one prompt and one step", drawn, "tokens/s")
    # the models that follow are to have their composed figures at least
    later = len(s.models) - 1 - list(s.models).index(name)
    left = bench.end - time.monotonic() - (COMPOSED_S * later if s.on_gpu else 0.0)
    # capturing and checking the prompts come on top
    if 1.1 * estimate + 10 < left:
        drawn, how = batch * s.answer / _whole(model, batch, bench), "end to end by the engine"
        report.add(f"{label}: drawn, end to end by the engine", drawn, "tokens/s")
    else:
        report.add(
            f"{label}: end to end by the engine",
            f"left out: it would take {estimate:.0f} s and {max(left, 0):.0f} s are left; the composed figure stands",
        )
    report.add(f"{label}: drawn", drawn, "tokens/s")
    report.add(f"{label}: drawn is", how)
    ideal = rate(n, bench.machine, s.answer)
    if ideal is not None:
        report.add(f"{label}: roofline at batch {ideal.batch}", ideal.tokens_per_s, "tokens/s")
        report.add(f"{label}: share of the roofline", drawn / ideal.tokens_per_s)
    del model
    free()


def _prompt_seconds(bench: Bench, model: Hybrid) -> float:
    s = bench.setting
    ids = torch.randint(0, model.config.vocab_size, (s.prompt,)).tolist()
    seconds = min(_once(bench, lambda: prefill(model, [ids], model.cache(1, capacity=s.prompt), s.piece)) for _ in "ab")
    free()
    return seconds


def _whole(model: Hybrid, batch: int, bench: Bench) -> float:
    """Seconds from token ids in to token ids out, of a whole batch, as a user of the engine waits for them."""
    s = bench.setting
    engine = Engine(model, max_batch=batch, prefill_chunk=s.piece)
    prompts = torch.randint(0, model.config.vocab_size, (batch, s.prompt)).tolist()
    begin = time.perf_counter()
    done = list(engine.generate(prompts, Sampling(max_tokens=s.answer, temperature=0.0, ignore_eos=True)))
    seconds = time.perf_counter() - begin
    if any(len(completion.token_ids) != s.answer for completion in done):
        raise RuntimeError(f"the engine drew {[len(c.token_ids) for c in done]} tokens instead of {s.answer} each")
    return seconds


def _once(bench: Bench, run: object) -> float:
    assert callable(run)
    if not bench.setting.on_gpu:
        return bench.seconds(run)[0]
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ratios(bench: Bench) -> None:
    """The hybrid's speed over the Transformers', in the same run."""
    s = bench.setting
    drawn = {name: bench.value(f"{name}, {s.prompt} in / {s.answer} out: drawn") for name in s.models}
    ours = drawn.pop(HYBRID)
    for name, theirs in drawn.items():
        if ours and theirs:
            bench.report.add(f"{HYBRID} / {name}", ours / theirs, "x")
