"""Losses of reward models: a loop, TRL's numbers, extremes."""

import chex
import jax
import numpy as np
import pytest

import rlhf_jax as rlhf


def pairwise_by_loop(chosen, rejected, margin, center_coef):
    losses = []
    for c, r, m in zip(chosen, rejected, margin, strict=True):
        preferred = 1 / (1 + np.exp(-(float(c) - float(r) - m)))
        losses.append(-np.log(preferred) + center_coef * (float(c) + float(r)) ** 2)
    return np.mean(losses)


@pytest.mark.parametrize("center_coef", [0.0, 0.2])
@pytest.mark.parametrize("margin", [0.0, 0.7, np.float32([0.0, 0.1, -0.3, 2.0])])
def test_pairwise_loss_matches_a_loop(rng, margin, center_coef):
    chosen, rejected = rng.normal(size=(2, 4)).astype(np.float32)
    loss, metrics = rlhf.pairwise_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    margins = np.broadcast_to(margin, 4)
    expected = pairwise_by_loop(chosen, rejected, margins, center_coef)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(chosen > rejected))
    np.testing.assert_allclose(metrics["margin"], np.mean(chosen - rejected), rtol=1e-5)


@pytest.mark.parametrize("index", range(6))
def test_pairwise_loss_is_trls(golden, index):
    case = golden("reward_tokenwise")[f"pairwise{index}"]
    margin = case["margin"] if case["hp/use_margin"] else 0.0

    def loss(chosen, rejected):
        return rlhf.pairwise_loss(
            chosen, rejected, margin=margin, center_coef=float(case["hp/center_coef"])
        )

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        case["chosen"], case["rejected"]
    )
    outputs = [value, metrics["accuracy"], metrics["margin"], *gradients]
    names = ["loss", "accuracy", "margin", "grad_chosen", "grad_rejected"]
    for output, name in zip(outputs, names, strict=True):
        np.testing.assert_allclose(output, case[f"out/{name}"], rtol=1e-5, atol=1e-7, err_msg=name)


def test_padding_entries_have_no_effect(rng):
    chosen, rejected, margin = rng.normal(size=(3, 5)).astype(np.float32)
    mask = np.array([True, True, False, True, False])
    real = (chosen[mask], rejected[mask])
    expected = rlhf.pairwise_loss(*real, margin=margin[mask], center_coef=0.1)
    poisoned = [np.where(mask, x, np.nan).astype(np.float32) for x in (chosen, rejected, margin)]

    def loss(chosen, rejected):
        return rlhf.pairwise_loss(chosen, rejected, margin=poisoned[2], center_coef=0.1, mask=mask)

    output, gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*poisoned[:2])
    chex.assert_trees_all_close(output, expected, rtol=1e-6)
    for gradient in gradients:
        assert np.all(gradient[mask] != 0)
        assert np.all(gradient[~mask] == 0)
    nothing, _ = rlhf.pairwise_loss(*poisoned[:2], mask=np.zeros(5, bool))
    assert nothing == 0


@pytest.mark.parametrize("difference", [-1e4, -90.0, 90.0, 1e4])
def test_extreme_scores_have_finite_losses_and_gradients(difference):
    chosen, rejected = np.float32([difference]), np.zeros(1, np.float32)
    loss = lambda x: rlhf.pairwise_loss(x, rejected)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(chosen)
    np.testing.assert_allclose(value, max(-difference, 0.0), atol=1e-6)
    np.testing.assert_allclose(gradient, [-1.0 if difference < 0 else 0.0], atol=1e-6)


def test_a_tie_is_no_success():
    scores = np.ones(2, np.float32)
    assert rlhf.pairwise_loss(scores, scores)[1]["accuracy"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("margin", np.zeros(3, np.float32)), ("margin", np.zeros(2, int)), ("mask", np.ones(2))],
)
def test_wrong_keywords_are_named(name, value):
    scores = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=f"^{name} must be .*B.* but is "):
        rlhf.pairwise_loss(scores, scores, **{name: value})


def test_scores_that_are_no_arrays_are_named():
    with pytest.raises(ValueError, match=r"^chosen must be float\[B\], but is a list"):
        rlhf.pairwise_loss([1.0], [2.0])


PAIR = ["chosen_scores", "rejected_scores", "chosen_tokens", "rejected_tokens"]
TOKENWISE = [
    "both_padded",
    "one_side_without_pad",
    "neither_padded",
    "lengths_differ_much",
    "one_is_prefix_of_other",
    "differ_in_last_token",
    "differ_at_first_token",
    "large_scores",
]


def tokenwise_by_loop(chosen, rejected, chosen_tokens, rejected_tokens, lengths, past_end):
    """(loss, metrics, gradients) of full examples and their (chosen, rejected) lengths."""
    losses, accurate, margins, same = [], [], [], []
    end_scores, gradients = np.zeros((2, len(chosen))), np.zeros((2, *chosen.shape))
    for b, (c, r) in enumerate(lengths):
        end = max(c, r)
        terms = []
        for t in range(end):
            parted = c != r and t >= min(c, r)
            parted |= any(
                chosen_tokens[b, s] != rejected_tokens[b, s] for s in range(min(t + 1, c, r))
            )
            at = (min(t, c - 1), min(t, r - 1)) if past_end == "last" else (t, t)
            difference = float(chosen[b, at[0]]) - float(rejected[b, at[1]])
            end_scores[:, b] = chosen[b, at[0]], rejected[b, at[1]]
            if parted:
                terms.append((np.log1p(np.exp(-difference)), -1 / (1 + np.exp(difference)), at))
        for _, slope, (i, j) in terms:
            gradients[0, b, i] += slope / len(terms) / len(chosen)
            gradients[1, b, j] -= slope / len(terms) / len(chosen)
        losses.append(np.mean([loss for loss, _, _ in terms]) if terms else 0.0)
        margins.append(end_scores[0, b] - end_scores[1, b] if terms else 0.0)
        accurate.append(margins[-1] > 0)
        same.append(not terms)
    metrics = {"accuracy": accurate, "margin": margins, "no_difference": same}
    metrics = {name: np.mean(x) for name, x in metrics.items()}
    metrics |= {"chosen_end_scores": end_scores[0], "rejected_end_scores": end_scores[1]}
    return np.mean(losses), metrics, gradients


def make_pairs(rng):
    """Six pairs that begin alike and differ in tokens, in length, in both, and not at all."""
    tokens = rng.integers(0, 50, size=(6, 9))
    chosen_tokens, rejected_tokens = tokens.copy(), tokens.copy()
    rejected_tokens[0, 2:] += 1  # all of the rest
    rejected_tokens[1, 3] += 1  # one token in the middle
    rejected_tokens[2, 0] += 1  # the first one
    lengths = np.array([[9, 5], [6, 6], [4, 7], [3, 8], [6, 5], [7, 7]])
    chosen, rejected = rng.normal(size=(2, 6, 9)).astype(np.float32)
    return [chosen, rejected, chosen_tokens, rejected_tokens], lengths


def masks_of(lengths, size):
    return [np.arange(size) < lengths[:, [side]] for side in (0, 1)]


@pytest.mark.parametrize("past_end", ["last", "published"])
def test_tokenwise_loss_matches_a_loop(rng, past_end):
    arrays, lengths = make_pairs(rng)
    masks = masks_of(lengths, 9)

    def loss(chosen, rejected):
        return rlhf.tokenwise_pairwise_loss(
            chosen, rejected, *arrays[2:], *masks, past_end=past_end
        )

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*arrays[:2])
    expected, by_loop, slopes = tokenwise_by_loop(*arrays, lengths, past_end)
    assert by_loop["no_difference"] == 1 / 6
    assert 0 < by_loop["accuracy"] < 1
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(metrics, by_loop, rtol=1e-5)
    chex.assert_trees_all_close(gradients, tuple(slopes), rtol=1e-5, atol=1e-7)


def test_tokenwise_keeps_the_last_score_by_default(rng):
    arrays, lengths = make_pairs(rng)
    value, _ = rlhf.tokenwise_pairwise_loss(*arrays, *masks_of(lengths, 9))
    expected, _, _ = tokenwise_by_loop(*arrays, lengths, "last")
    other, _, _ = tokenwise_by_loop(*arrays, lengths, "published")
    assert abs(expected - other) > 1e-3
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("name", TOKENWISE)
def test_published_tokenwise_loss_is_that_of_the_published_code(golden, name):
    case = {
        key.removeprefix(f"{name}/"): x
        for key, x in golden("reward_tokenwise")["tokenwise"].items()
        if key.startswith(f"{name}/")
    }
    masks = case["chosen_mask"], case["rejected_mask"]

    def loss(chosen, rejected):
        tokens = case["chosen_tokens"], case["rejected_tokens"]
        return rlhf.tokenwise_pairwise_loss(chosen, rejected, *tokens, *masks, past_end="published")

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        case["chosen_scores"], case["rejected_scores"]
    )
    end_scores = metrics["chosen_end_scores"], metrics["rejected_end_scores"]
    names = ["loss", "grad_chosen_scores", "grad_rejected_scores"]
    names += ["chosen_end_scores", "rejected_end_scores"]
    for output, key in zip([value, *gradients, *end_scores], names, strict=True):
        np.testing.assert_allclose(output, case[f"out/{key}"], rtol=5e-6, atol=1e-7, err_msg=key)
    published = case["out/chosen_end_scores"] - case["out/rejected_end_scores"]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(published > 0))
    np.testing.assert_allclose(metrics["margin"], np.mean(published), rtol=5e-6)
    assert metrics["no_difference"] == 0


@pytest.mark.parametrize(("masks", "equal"), [("before_first_pad", True), ("including_eos", False)])
def test_where_eos_is_pad_the_published_code_leaves_eos_out(golden, masks, equal):
    """EOS is an action here (design fact 2): with it in the masks, the loss is another one."""
    case = golden("reward_tokenwise")["tokenwise_eos_is_pad"]
    value, metrics = rlhf.tokenwise_pairwise_loss(
        *(case[name] for name in PAIR),
        *(case[f"{side}_mask_{masks}"] for side in ("chosen", "rejected")),
        past_end="published",
    )
    assert bool(np.isclose(value, case["out/loss"], rtol=5e-6)) == equal
    for name in ("chosen_end_scores", "rejected_end_scores"):
        assert np.allclose(metrics[name], case[f"out/{name}"], rtol=5e-6) == equal


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_counts_of_the_padding_is_only_what_is_published(rng, garbage):
    arrays, lengths = make_pairs(rng)
    masks = masks_of(lengths, 9)
    either = masks[0] | masks[1]

    def outputs(real, past_end):
        scores = [np.where(m, x, garbage).astype(np.float32) for m, x in zip(real, arrays[:2])]
        tokens = [np.where(m, x, -100) for m, x in zip(masks, arrays[2:])]
        return jax.value_and_grad(rlhf.tokenwise_pairwise_loss, (0, 1), has_aux=True)(
            *scores, *tokens, *masks, past_end=past_end
        )

    everything = [np.ones_like(either)] * 2
    chex.assert_trees_all_equal(outputs(masks, "last"), outputs(everything, "last"))
    past_both = outputs([either, either], "published")
    chex.assert_trees_all_equal(past_both, outputs(everything, "published"))
    assert np.isfinite(past_both[0][0])
    assert not np.isfinite(outputs(masks, "published")[0][0])


@pytest.mark.parametrize("past_end", ["last", "published"])
def test_entries_without_a_pair_do_not_change_the_tokenwise_loss(rng, past_end):
    arrays, lengths = make_pairs(rng)
    examples = np.array([True, True, False, True, False, True])
    masks = masks_of(lengths, 9)
    kept = [x[examples] for x in (*arrays, *masks)]
    expected, metrics = rlhf.tokenwise_pairwise_loss(*kept, past_end=past_end)
    empty = [m & examples[:, None] for m in masks]
    for output, by_pair in (
        rlhf.tokenwise_pairwise_loss(*arrays, *masks, mask=examples, past_end=past_end),
        rlhf.tokenwise_pairwise_loss(*arrays, *empty, past_end=past_end),
    ):
        np.testing.assert_allclose(output, expected, rtol=1e-6)
        for name, metric in metrics.items():
            of_pairs = by_pair[name][examples] if metric.ndim else by_pair[name]
            np.testing.assert_allclose(of_pairs, metric, rtol=1e-6, err_msg=name)
        assert not np.any(by_pair["chosen_end_scores"][~examples])


@pytest.mark.parametrize("past_end", ["last", "published"])
def test_padding_before_the_prompt_is_no_difference(rng, past_end):
    arrays, lengths = make_pairs(rng)
    masks = masks_of(lengths, 9)
    arrays[3][:, 0] = arrays[2][:, 0]  # so that all pairs begin alike
    expected = rlhf.tokenwise_pairwise_loss(*arrays, *masks, past_end=past_end)
    fillers = np.nan, np.nan, -1, -2, False, False
    padded = [
        np.pad(x, ((0, 0), (2, 0)), constant_values=filler)
        for x, filler in zip([*arrays, *masks], fillers, strict=True)
    ]
    output = rlhf.tokenwise_pairwise_loss(*padded, past_end=past_end)
    chex.assert_trees_all_close(output, expected, rtol=1e-6)


def test_a_response_without_a_token_scores_zero():
    scores, tokens = np.float32([[3.0, 4.0]]), np.ones((1, 2), int)
    masks = np.array([[True, True]]), np.array([[False, False]])
    loss, metrics = rlhf.tokenwise_pairwise_loss(scores, scores, tokens, tokens, *masks)
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp([-3.0, -4.0]))), rtol=1e-6)
    assert (metrics["chosen_end_scores"], metrics["rejected_end_scores"]) == (4, 0)


@pytest.mark.parametrize("past_end", ["last", "published"])
@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_extreme_token_scores_have_finite_losses_and_gradients(rng, score, past_end):
    arrays, lengths = make_pairs(rng)
    chosen = np.full((6, 9), score, np.float32)
    (loss, metrics), gradient = jax.value_and_grad(rlhf.tokenwise_pairwise_loss, has_aux=True)(
        chosen, -chosen, *arrays[2:], *masks_of(lengths, 9), past_end=past_end
    )
    np.testing.assert_allclose(loss, 0.0 if score > 0 else 2e4 * 5 / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], 2 * score * 5 / 6, rtol=1e-6)
    np.testing.assert_allclose(gradient.sum(), 0.0 if score > 0 else -5 / 6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("past_end", "first", "past_end must be one of 'last', 'published', but is 'first'"),
        ("mask", np.ones(5, bool), r"mask must be bool\[B\] with B = 6, but is bool\[5\]"),
        ("mask", np.ones(6, int), r"mask must be bool\[B\] with B = 6, but is int"),
    ],
)
def test_wrong_keywords_of_the_tokenwise_loss_are_named(rng, name, value, message):
    arrays, lengths = make_pairs(rng)
    with pytest.raises(ValueError, match=f"^{message}"):
        rlhf.tokenwise_pairwise_loss(*arrays, *masks_of(lengths, 9), **{name: value})


def ranking_by_loop(scores, mask):
    losses, correct, margins = [], [], []
    for row, real in zip(np.float64(scores), mask, strict=True):
        ranked = row[real]
        pairs = [(x, y) for i, x in enumerate(ranked) for y in ranked[i + 1 :]]
        if pairs:
            losses.append(np.mean([np.log1p(np.exp(y - x)) for x, y in pairs]))
            correct.append(np.mean([x > y for x, y in pairs]))
            margins.append(np.mean([x - y for x, y in pairs]))
    return np.mean(losses), np.mean(correct), np.mean(margins)


def test_ranking_loss_matches_a_loop(rng):
    scores = rng.normal(size=(6, 5)).astype(np.float32)
    scores[1, 1] = scores[1, 0]  # a tie
    mask = np.arange(5) < np.array([5, 2, 1, 0, 4, 3])[:, None]
    mask[4] = [True, False, True, False, True]
    loss, metrics = rlhf.ranking_loss(scores, mask)
    expected = ranking_by_loop(scores, mask)
    assert 0 < expected[1] < 1
    actual = [loss, metrics["accuracy"], metrics["margin"]]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("index", range(3))
def test_ranking_loss_is_the_equation_in_numpy(golden, index):
    case = golden("reward_tokenwise")[f"ranking_numpy_only{index}"]
    loss, _ = rlhf.ranking_loss(case["scores"], case["mask"])
    np.testing.assert_allclose(loss, case["derived/loss"], rtol=5e-6)
    for b, of_prompt in enumerate(case["derived/loss_per_prompt"]):
        of_one, _ = rlhf.ranking_loss(case["scores"][b : b + 1], case["mask"][b : b + 1])
        np.testing.assert_allclose(of_one, of_prompt, rtol=5e-6)


def test_with_two_responses_ranking_is_the_pairwise_loss(rng):
    scores = rng.normal(size=(5, 2)).astype(np.float32)
    mask = np.array([[True, True]] * 4 + [[True, False]])
    ranking = rlhf.ranking_loss(scores, mask)
    pairwise = rlhf.pairwise_loss(scores[:, 0], scores[:, 1], mask=mask.all(axis=1))
    chex.assert_trees_all_close(ranking, pairwise, rtol=1e-6)


@pytest.mark.parametrize("step", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_extreme_rankings_have_finite_losses_and_gradients(step):
    scores = np.float32([[step, 0.0, -step, np.nan]])
    mask = np.array([[True, True, True, False]])
    (loss, metrics), gradient = jax.value_and_grad(rlhf.ranking_loss, has_aux=True)(scores, mask)
    np.testing.assert_allclose(loss, np.logaddexp(0, [-step, -step, -2 * step]).mean(), 1e-6, 1e-30)
    assert np.isfinite(gradient).all()
    assert metrics["accuracy"] == (step > 0)


def test_single_responses_are_no_ranking():
    loss = lambda x: rlhf.ranking_loss(x, np.ones((3, 1), bool))[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(np.ones((3, 1), np.float32))
    assert value == 0
    assert not np.any(gradient)
