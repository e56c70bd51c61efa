import pytest

from plait.data.blend import Blend, Phase, Plan

SIZES = {"web": 5000, "code": 900, "math": 70, "tiny": 3}
PHASES = (
    Phase(0.6, {"web": 0.7, "code": 0.2, "math": 0.1}),
    Phase(0.8, {"web": 0.4, "code": 0.4, "math": 0.2}),
    Phase(1.0, {"code": 1, "math": 2, "tiny": 0.01}),
)


def plan(blend=None, n_samples=20_000, seed=0, **how):
    return Plan(blend or Blend(phases=PHASES), SIZES, seq_len=8, seed=seed, n_samples=n_samples, **how)


@pytest.mark.parametrize("n_samples", [100, 20_000, 60_000])
def test_each_source_gives_its_samples_in_order_without_gap(n_samples):
    seen = dict.fromkeys(SIZES, 0)
    mixed = plan(n_samples=n_samples)
    for i in range(n_samples + 50):
        if i % 997 == 0:
            assert mixed.counts(i) == {name: seen[name] for name in mixed.counts(i)}
        name, k = mixed.locate(i)
        assert k == seen[name]
        seen[name] += 1


@pytest.mark.parametrize("n_samples", [2000, 50_000])
def test_weights_hold_in_every_phase_within_a_percent(n_samples):
    mixed = plan(n_samples=n_samples)
    begin = 0
    for phase in PHASES:
        end = round(phase.until * n_samples)
        before, after = mixed.counts(begin), mixed.counts(end)
        for name in SIZES:
            wanted = phase.weights.get(name, 0) / sum(phase.weights.values())
            got = (after.get(name, 0) - before.get(name, 0)) / (end - begin)
            assert abs(got - wanted) <= 0.01 * wanted + 2 / (end - begin)
        begin = end


def test_weights_hold_in_any_short_stretch():
    mixed = plan(Blend.of({"web": 0.5, "code": 0.3, "math": 0.2}))
    for begin in (0, 77, 5000, 16_380, 19_000):
        before, after = mixed.counts(begin), mixed.counts(begin + 100)
        for name, weight in (("web", 50), ("code", 30), ("math", 20)):
            assert abs(after[name] - before[name] - weight) <= 5


def test_any_sample_is_found_without_the_ones_before_it():
    asked_in_order = plan()
    wanted = [asked_in_order.locate(i) for i in range(20_000)]
    for i in (19_999, 3, 12_000, 11_999, 16_000, 0):
        assert plan().locate(i) == wanted[i]


def test_far_samples_cost_no_more_than_near_ones():
    mixed = plan(Blend.of({"web": 0.9, "tiny": 0.1}), n_samples=None)
    name, k = mixed.locate(10**13)
    assert abs(mixed.counts(10**13)["tiny"] / 10**12 - 1) < 1e-3
    assert k == mixed.counts(10**13)[name]


def test_the_seed_changes_the_order_and_not_the_counts():
    a, b = plan(seed=0), plan(seed=1)
    assert [a.locate(i) for i in range(200)] != [b.locate(i) for i in range(200)]
    assert all(abs(a.counts(20_000)[name] - b.counts(20_000)[name]) <= 6 for name in a.counts(0))


def test_phases_may_end_after_tokens():
    mixed = plan(Blend(phases=(Phase(801, {"web": 1}), Phase(1.0, {"code": 1}))), n_samples=None)
    names = [mixed.locate(i)[0] for i in range(200)]
    # 801 tokens are 101 samples of 8
    assert names == ["web"] * 101 + ["code"] * 99


def test_the_last_phase_goes_on_beyond_its_end():
    mixed = plan(Blend(phases=(Phase(0.5, {"web": 1}), Phase(0.9, {"code": 1}))), n_samples=100)
    assert mixed.locate(500) == ("code", 450)


def test_a_weight_above_zero_always_gets_a_place():
    mixed = plan(Blend.of({"web": 1, "tiny": 1e-9, "code": 0}))
    assert mixed.counts(1 << 14) == {"tiny": 1, "web": (1 << 14) - 1}


def test_a_source_beyond_its_epochs_is_refused_with_numbers():
    blend = Blend(phases=PHASES, max_epochs={"*": 10, "math": 50})
    with pytest.raises(
        ValueError, match=r"source math would be read 6\d.* times, max_epochs allows 50; lower its weight"
    ):
        plan(blend)
    assert plan(Blend(phases=PHASES, max_epochs={"*": 10, "math": 70}))
    with pytest.raises(ValueError, match="max_epochs needs the length"):
        plan(Blend(phases=PHASES[-1:], max_epochs={"*": 10}), n_samples=None)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Phase(0, {"web": 1}), "until = 0"),
        (lambda: Phase(float("nan"), {"web": 1}), "until = nan"),
        (lambda: Phase(1, {"web": -1}), "weight of web = -1"),
        (lambda: Phase(1, {"web": float("inf")}), "weight of web = inf"),
        (lambda: Phase(1, {"web": 0}), "name no source"),
        (lambda: Phase(1, {}), "name no source"),
        (lambda: Blend(phases=()), "phases is empty"),
        (lambda: Blend(phases=PHASES, max_epochs={"web": 0}), "max_epochs of web = 0"),
        (lambda: plan(Blend.of({"books": 1})), "source 'books', which is not there; sources are web"),
        (lambda: plan(Blend(phases=PHASES, max_epochs={"books": 1})), "source 'books'"),
        (
            lambda: plan(Blend(phases=(Phase(0.6, {"web": 1}), Phase(0.6, {"web": 1}), PHASES[2]))),
            "phases end at 0.6, 0.6",
        ),
        (lambda: plan(n_samples=None), "length is open"),
    ],
)
def test_what_does_not_fit_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
