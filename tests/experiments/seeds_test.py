import dataclasses

import jax
import numpy as np
import pytest

from configs import base
from experiments import data, seeds
from experiments.state import prepare
from experiments.train import make_train_step
from sparsejax.masks.layout import named_leaves

CONFIG = base.Config(
    model=base.Model(widths=(12,)),
    sparse=base.Sparse(sparsity=0.8, update_every=4, stop_fraction=1.0),
    optimizer=base.Optimizer(warmup_steps=2),
    num_steps=16,
    batch_size=64,
    eval_batch_size=104,
)
DIGITS = data.load(base.Data("digits"))
SEEDS, STEPS = 2, 4


@pytest.fixture(scope="module")
def trained():
    trainings = seeds.Trainings(CONFIG, DIGITS, SEEDS)
    batches = seeds.rounds(CONFIG, DIGITS, SEEDS, STEPS)
    return trainings, [trainings.advance(batch) for batch in batches]


@pytest.mark.parametrize(("steps", "lengths"), [(8, [8, 8]), (6, [6, 6, 4])])
def test_rounds_are_the_batches_of_each_seed(steps, lengths):
    rounds = list(seeds.rounds(CONFIG, DIGITS, SEEDS, steps))
    assert [len(batches["label"]) for batches in rounds] == lengths
    for seed in range(SEEDS):
        for name in ("image", "label"):
            expected = DIGITS.train_batches(CONFIG.batch_size, seed=seed)
            for batch in np.concatenate([batches[name][:, seed] for batches in rounds]):
                np.testing.assert_array_equal(batch, next(expected)[name])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_seed_trains_as_it_would_alone(trained, seed):
    trainings, rounds = trained
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    alone = prepare(dataclasses.replace(CONFIG, seed=seed), DIGITS, device)
    state, train_step = alone.init(), make_train_step(alone, DIGITS)
    for path, mask in named_leaves(alone.masks(state)).items():
        together = named_leaves(trainings.first_masks)[path]
        np.testing.assert_array_equal(together[seed], mask, err_msg=path)

    losses = []
    batches = DIGITS.train_batches(CONFIG.batch_size, seed=seed)
    for _ in range(CONFIG.num_steps):
        state, metrics = train_step(state, next(batches))
        losses.append(metrics["loss"])
    together = np.concatenate([done.losses[:, seed] for done in rounds])
    np.testing.assert_allclose(together, losses, rtol=1e-3)
    for path, mask in named_leaves(alone.masks(state)).items():
        np.testing.assert_array_equal(
            named_leaves(rounds[-1].masks)[path][seed], mask, err_msg=path
        )


def test_seeds_differ_and_masks_move(trained):
    trainings, rounds = trained
    first = named_leaves(trainings.first_masks)
    for path, mask in named_leaves(rounds[-1].masks).items():
        assert (mask[0] != mask[1]).any(), path
        assert (mask != first[path]).any(), path
        np.testing.assert_array_equal(mask.sum((1, 2)), first[path].sum((1, 2)))


def test_accuracies_are_those_on_the_whole_test_set(trained):
    trainings, rounds = trained
    assert [done.step for done in rounds] == [4, 8, 12, 16]
    layers = jax.device_get(trainings.state["model"]["layers"])
    for seed in range(SEEDS):
        x = np.asarray(DIGITS.normalize(DIGITS.test.images)).reshape(-1, 64)
        x = np.maximum(x @ layers[0]["kernel"][seed] + layers[0]["bias"][seed], 0)
        x = x @ layers[1]["kernel"][seed] + layers[1]["bias"][seed]
        correct = (x.argmax(axis=1) == DIGITS.test.labels).sum()
        assert rounds[-1].accuracies[seed] == pytest.approx(correct / 360)


def test_rounds_compile_once(caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        trainings = seeds.Trainings(CONFIG, DIGITS, SEEDS)
        for batches in seeds.rounds(CONFIG, DIGITS, SEEDS, STEPS):
            trainings.advance(batches)
    compiled = [r.message for r in caplog.records if r.message.startswith("Compiling")]
    for name in ("jit(advance)", "jit(eval_step)"):
        assert sum(name in message for message in compiled) == 1, name


def test_interval_of_a_mean():
    # 2.776445 is the 97.5 % quantile of Student's t with 4 degrees of freedom.
    mean, half = seeds.mean_and_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert half == pytest.approx(2.776445 * np.sqrt(2.5 / 5), rel=1e-6)


def test_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(size=(2000, 5))
    for confidence in (0.5, 0.95):
        found = [seeds.mean_and_interval(sample, confidence) for sample in samples]
        covered = np.mean([abs(mean) <= half for mean, half in found])
        assert covered == pytest.approx(confidence, abs=0.03)
