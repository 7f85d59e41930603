"""The ablations' protocol: its statistics, its queue, what its arms change, and what its T5 has not read."""

import json
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import wilcoxon

from experiments.ablations import arms, draw, measure, pretrain, protocol, run
from experiments.ablations.paired import bootstrap_interval, compare, sign_flip_p
from opendet_jax.data.scene_drawing import KINDS, UNSEEN
from opendet_jax.data.text_embeddings import HashedEmbedder
from opendet_jax.data.tokenizer import END, ByteTokenizer
from opendet_jax.errors import InputError


def test_six_differences_of_one_sign_have_the_smallest_p():
    assert sign_flip_p([1.0, 2.0, 0.5, 3.0, 0.1, 1.5]) == 2 / 64
    assert sign_flip_p([1.0, 2.0, 0.5, 3.0, -0.1, 1.5]) == 4 / 64  # the next best: the least of them has the other sign


def test_sign_flip_p_of_ranks_is_wilcoxons():
    """The signed-rank test is the sign-flip test of ranks."""
    differences = np.array([0.3, -0.1, 0.9, 1.4, -0.2, 2.2])
    ranks = np.sign(differences) * (np.argsort(np.argsort(np.abs(differences))) + 1)
    assert sign_flip_p(ranks) == pytest.approx(wilcoxon(differences, method="exact").pvalue)


def test_p_is_one_where_no_sign_matters():
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p([1.0, -1.0]) == 1.0


def test_bootstrap_looks_at_every_resample():
    values = [0.5, -1.0, 2.0, 0.25]
    means = [np.mean(resample) for resample in product(values, repeat=4)]
    assert bootstrap_interval(values) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))


def test_differences_must_be_few_and_finite():
    for wrong in ([], [1.0] * 8, [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite differences"):
            sign_flip_p(wrong)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([3, 4, 5, 3, 4, 5], "holds"),
        ([-3, -4, -5, -3, -4, -5], "reversed"),
        ([0.1, -0.2, 0.3, -0.1, 0.2, -0.3], "no difference"),
        ([5, -4, 6, -3, 4, -2], "undecided"),
        ([3, 4, 5, 3, 4], "too few runs"),
        ([0.1, 0.2, 0.1, 0.2, 0.1, 0.2], "holds"),  # small, and there
    ],
)
def test_verdict(differences, verdict):
    first = dict(enumerate(differences))
    found = compare(first, dict.fromkeys(range(9), 0.0), smallest=2.0, pairs=6)
    assert found is not None
    assert found.verdict == verdict
    assert found.mean == pytest.approx(np.mean(differences))


def test_only_seeds_of_both_arms_are_compared():
    found = compare({0: 1.0, 2: 5.0, 3: 7.0}, {2: 4.0, 3: 9.0, 4: 1.0}, smallest=1.0, pairs=6)
    assert found is not None
    assert (found.seeds, found.differences.tolist()) == ((2, 3), [1.0, -2.0])
    assert compare({0: 1.0}, {1: 1.0}, smallest=1.0, pairs=6) is None


def test_the_queue_is_what_has_neither_a_result_nor_a_failure(tmp_path):
    results, table = tmp_path / "results", tmp_path / "runs.csv"
    results.mkdir()
    whole = run.queue(results, table)
    assert whole[:7] == [*(f"full_{seed}" for seed in range(6)), "generateu_0"]
    assert len(whole) == len(set(whole)) == len(arms.ARMS) * 6
    (results / "full_1.json").write_text("{}")
    row = {"kind": "protocol", "arm": "full", "steps": 600}
    run.add_row(table, row | {"seed": 1, "outcome": "done", "AP": 0.123456})
    run.add_row(table, row | {"seed": 3, "outcome": "failed: a loss, of the steps up to 150, is not a number"})
    assert run.queue(results, table) == [name for name in whole if name not in ("full_1", "full_3")]
    done, failed = run.read_rows(table)
    assert (done["AP"], done["minutes"], failed["seed"]) == ("0.1235", "", "3")
    assert failed["outcome"].endswith("150, is not a number")
    assert len(table.read_text().splitlines()) == 3  # one heading
    with table.open("a") as file:
        file.write("protocol,full,4,do")  # a process that was killed
    run.add_row(table, row | {"seed": 5, "outcome": "done"})
    assert run.read_rows(table)[-1]["seed"] == "5"
    assert "full_4" in run.queue(results, table)


@pytest.mark.parametrize("name", ["full", "full_x", "empty_0", "full_7"])
def test_what_is_no_run_is_said(name):
    with pytest.raises(InputError, match=name):
        run.arm_and_seed(name)


def test_seeds_of_pilots_are_none_of_the_protocol():
    assert not {*arms.SEEDS} & {*arms.PILOT_SEEDS}
    assert run.arm_and_seed("no_aligner_901") == ("no_aligner", 901)


def test_every_arm_differs_from_the_full_method_in_what_it_says():
    full = arms.config_of(arms.ARMS["full"], 0)
    for arm in arms.ARMS.values():
        config = arms.config_of(arm, 0)
        off = {name for name, value in vars(config.ablation).items() if not value}
        if not arm.generateu:
            assert off == {*arm.off}
        assert (config.optimizer, config.data, config.train) == (full.optimizer, full.data, full.train)
        assert config.model.t5 == full.model.t5
        assert (config.model.denoising_queries > 0) == config.ablation.object_detector
    ladder = [
        arms.config_of(arms.ARMS[name], 0).ablation for name in ("generateu", "ladder_detector", "ladder_aligner")
    ]
    assert [switches.object_detector for switches in ladder] == [False, True, True]
    assert [switches.aligner for switches in ladder] == [False, False, True]


def test_runs_of_an_arm_share_a_program_and_nothing_else():
    one, two = (arms.config_of(arms.ARMS["full"], seed) for seed in (0, 1))
    assert one != two
    assert arms.without_seed(one) == arms.without_seed(two)


def test_shuffled_texts_are_those_of_other_names():
    names = [kind.name for kind in KINDS]
    shuffled, own = arms.ShuffledEmbedder(16).embed(names), HashedEmbedder(16).embed(names)
    place = (shuffled @ own.T).argmax(1)
    assert sorted(place) == list(range(len(names)))
    assert not (place == np.arange(len(names))).any()
    np.testing.assert_array_equal(shuffled, own[place])


def test_t5_has_read_the_scenes_words_and_none_of_the_names_kept_for_evaluation():
    corpus = {*pretrain.corpus()}
    assert not corpus & {kind.name for kind in UNSEEN}
    assert corpus >= {kind.name for kind in KINDS if kind not in UNSEEN}
    trained, held_out = pretrain._split(sorted(corpus))
    assert not {*trained} & {*held_out}
    assert not {*held_out} & {kind.name for kind in KINDS}


def test_a_span_is_replaced_by_one_mark():
    names = ["blue striped star", "red ring"] * 20
    tokenizer = ByteTokenizer()
    for length in (1, 4, 8):
        inputs, targets = pretrain.examples(names, length, np.random.default_rng(0))
        assert inputs.shape == (40, length)
        for name, given, target in zip(names, inputs, targets, strict=True):
            place = int(np.flatnonzero((given == pretrain.SPAN) | (given == pretrain.NAME))[0])
            written = target[: list(target).index(END)]
            if given[place] == pretrain.NAME:
                assert tokenizer.decode(written) == name
            else:
                assert written[0] == pretrain.SPAN
                assert tokenizer.decode(np.concatenate([given[:place], written[1:], given[place + 1 :]])) == name


def test_the_t5_that_is_kept_fits_every_arm():
    config = arms.config_of(arms.ARMS["full"], 0)
    params = pretrain.load_t5()
    assert params["shared"]["embedding"].shape == (config.model.t5.vocab_size, config.model.text_width)
    figures = json.loads(pretrain.FIGURES.read_text())
    assert figures["names"] == len(pretrain.corpus())
    assert figures["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))


def result(ap: float, naming: list[float] | None = None, **measured) -> dict:
    final = {"step": arms.STEPS, "AP": ap, "AP50": ap, "APr": ap, "APu": ap, "agnostic_AP": ap}
    kept = {"curve": [final], "naming": naming or [1.0] * arms.STEPS, "aligner_removed_changes": 0}
    modes = {
        kind: {"share_concerned": 0.25, "opposing_pairs": 0.0, "cancelled": 0.0}
        for kind in ("with_mask", "without_mask")
    }
    gradients = {"one_to_many": modes, "one_to_one": modes, "share_of_scenes": {"with_two_of_a_name": 0.5}}
    return kept | {"opposing_gradients": gradients} | measured


def test_steps_to_a_naming_loss():
    falling = [2.0] * 100 + [1.0] * (arms.STEPS - 100)
    assert protocol.steps_to(1.0)(result(0.1, falling)) == 150  # the first window with none of the higher ones
    assert protocol.steps_to(2.0)(result(0.1, falling)) == protocol.WINDOW
    assert protocol.steps_to(0.5)(result(0.1, falling)) == arms.STEPS
    assert protocol.naming_level({0: result(0.1, falling)}) == pytest.approx(1.0)
    assert protocol.smallest_effect({0: result(0.2), 1: result(0.4)}) == pytest.approx(0.03)


def test_tables_of_what_there_is(tmp_path, monkeypatch):
    """Full runs of all seeds, two of the baseline and nothing else: no verdict but on noise, and what is missing."""
    monkeypatch.setattr(draw, "TABLE", tmp_path / "runs.csv")
    for seed in arms.SEEDS:
        (tmp_path / f"full_{seed}.json").write_text(json.dumps(result(0.3 + 0.001 * seed)))
    for seed in (0, 1):
        (tmp_path / f"generateu_{seed}.json").write_text(json.dumps(result(0.25 + 0.001 * seed)))
    results = draw.read_results(tmp_path)
    shown = "\n".join(draw.tables(results, 8))
    assert "**8 of 90 runs are done, 0 failed.**" in shown
    assert "With some of their six seeds: `generateu` 2. Not run yet: `frozen_llm`, " in shown
    assert "AP of `full` over 6 seeds is 30.2 ± 0.19 (standard deviation), below half" in shown
    trained = next(line for line in shown.splitlines() if "LLM trained |" in line and "GenerateU" in line)
    assert trained.endswith("| +5.0 | +5.0 to +5.0 | 0.500 | 2 | too few runs |")
    assert "| LLM trained above frozen | +7.0 | – | – | – | 0 | not run |" in shown
    assert "changed 0 detections, in 0 of 8 runs" in shown


@pytest.mark.slow  # compiles a training step
def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """Steps, order and random numbers are those of a run that was not; evaluation and measures are left out."""
    from experiments.ablations import trial

    for name, value in {"STEPS": 4, "EVALUATED": (2, 4), "SCENES_TRAIN": 24, "SCENES_EVAL": 2}.items():
        monkeypatch.setattr(trial, name, value)
    stopped_after: list[int] = []

    def evaluate(inference, dataset, config, folder, step):
        if step in stopped_after:
            raise KeyboardInterrupt
        return {"AP": 0.25, "images": len(dataset)}

    monkeypatch.setattr(trial, "evaluate", evaluate)
    programs = trial.Programs(arms.ARMS["generateu"])
    programs.measures = lambda params, evaluated, opposing_on: {
        "sum": float(sum(x.sum() for x in jax.tree.leaves(params)))
    }
    whole = trial.run(programs, 900, tmp_path / "whole", print)
    stopped_after.append(4)
    with pytest.raises(KeyboardInterrupt):
        trial.run(programs, 900, tmp_path / "cut", print)
    stopped_after.clear()
    cut = trial.run(programs, 900, tmp_path / "cut", print)
    timed = ("minutes", "cpu_minutes", "restarts")
    assert {name: value for name, value in cut.items() if name not in timed} == {
        name: value for name, value in whole.items() if name not in timed
    }
    assert [point["step"] for point in cut["curve"]] == [2, 4]
    assert len(cut["naming"]) == len(set(cut["naming"])) == 4
    assert (whole["restarts"], cut["restarts"]) == (0, 1)
    assert not (tmp_path / "cut" / trial.STATE).exists()


def opposed(labels, gradient_of=(2.0, -1.0, 0.5)):
    """One query, matched with object 0, which has the name of object 1 but not of object 2."""
    same = jnp.array([[[True, True, False], [True, True, False], [False, False, True]]])
    counted = jnp.ones((1, 1, 3), bool)
    alignment, matched = jnp.array([[gradient_of]]), jnp.zeros((1, 1), jnp.int32)
    gradient = jax.grad(measure.masked_alignment_loss)(
        alignment, matched, same if labels else jnp.eye(3, dtype=bool)[None], counted
    )
    return measure._opposed_pairs(gradient, matched, same, counted)


def test_gradients_on_texts_of_one_name_oppose_without_the_mask_alone():
    with_mask, without = opposed(labels=True), opposed(labels=False)
    assert (with_mask.queries, with_mask.concerned, with_mask.pairs) == (1, 1, 1)
    assert (with_mask.opposing, without.opposing) == (0, 1)
    assert with_mask.cancelled == pytest.approx(0, abs=1e-6)
    assert 0 < without.cancelled <= 1


def test_what_is_said_of_objects():
    objects = {
        "cosine": [0.5, 0.7, 0.6, 0.2],
        "similarity": [1.0, 1.0, 0.5, 0.1],
        "score": [0.9, 0.8, 0.3, 0.1],
        "iou": [0.8, 0.9, 0.6, 0.1],  # the last query is on nothing: what it says does not count
        "right": [1.0, 1.0, 0.0, 1.0],
        "unseen": [0.0, 1.0, 1.0, 1.0],
    }
    assert measure._summary(objects) == {
        "query_text_cosine": 0.5,
        "name_similarity": 0.65,
        "score_iou_rank_correlation": 0.8,  # 1 − 6 · (1 + 1) / (4 · 15)
        "named_right_seen": 1.0,
        "named_right_never_seen": 0.5,
        "objects_never_seen": 2,
    }


def test_noise_says_nothing_of_the_image():
    from opendet_jax.model.encoder import Memory

    tokens = jax.random.normal(jax.random.key(1), (2, 6, 4)) + 3
    memory = Memory(tokens, jnp.ones((2, 6), bool), jnp.ones((2, 1, 2)), ((2, 3),))
    noise = arms.noise_like(memory, 0).tokens
    np.testing.assert_array_equal(noise[0], noise[1])
    assert abs(float(noise.mean() - tokens.mean())) < float(tokens.std())
    assert not jax.grad(lambda x: arms.noise_like(memory.replace(tokens=x), 0).tokens.sum())(tokens).any()
