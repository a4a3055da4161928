"""The loop against a loop written out by hand, its order of steps, and its refusals."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunus.data.batches import Batches
from prunus.data.examples import Examples, Splits
from prunus.errors import InvalidValue, NonFinite, Stopped, UnknownName
from prunus.masks import Masks
from prunus.train.callback import Callback
from prunus.train.loop import Training, fit
from prunus.train.optim import build

SHORT = Training(epochs=3, batch_size=16, lr=0.05)


def blobs(count=80, seed=0, name="blobs"):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = torch.randn(count, 6, generator=g) + F.one_hot(y, 6) * 5.0
    return Examples.from_arrays(x, y, classes=3, name=name)


def splits():
    return Splits(blobs(), blobs(30, 1), blobs(30, 2), "blobs")


def network(dropout=0.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def by_hand(model, examples, training, seed):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=training.weight_decay)
    batches = Batches(examples, training.batch_size, seed=seed)
    total = training.total_steps(batches.steps_per_epoch)
    step = 0
    for epoch in range(training.epochs):
        for x, y, _ in batches.epoch(epoch):
            optimizer.param_groups[0]["lr"] = training.lr * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            step += 1


def test_equals_a_loop_written_by_hand():
    ours, plain = network(), network()
    fitted = fit(ours, splits(), SHORT, seed=5)
    by_hand(plain, blobs(), SHORT, 5)
    torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)
    assert (fitted.step, fitted.total) == (15, 15)
    assert fitted.metrics["validation_accuracy"] > 0.9
    assert fitted.metrics["selected"] == "last"
    assert [row["epoch"] for row in fitted.history] == [1, 2, 3]


def test_the_seed_decides_everything_and_the_global_state_nothing():
    runs = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        model = network(dropout=0.5)
        before = torch.random.get_rng_state()
        fit(model, blobs(), SHORT, seed=1)
        assert torch.equal(torch.random.get_rng_state(), before)
        runs.append(flat(model))
    assert torch.equal(*runs)
    other = network(dropout=0.5)
    fit(other, blobs(), SHORT, seed=2)
    assert not torch.equal(flat(other), runs[0])


def test_cut_and_continued_equals_whole():
    whole = network(dropout=0.3)
    fit(whole, blobs(), SHORT, seed=1)
    parts = network(dropout=0.3)
    first = fit(parts, blobs(), SHORT, seed=1, until=7)
    assert first.step == 7
    fit(parts, blobs(), SHORT, seed=1, start_step=7, optimizer_start=first.optimizer)
    assert torch.equal(flat(whole), flat(parts))


def test_starting_later_takes_the_rates_of_later():
    seen = []

    class Watch(Callback):
        def event(self, step, model):
            seen.append(step)

    fitted = fit(network(), blobs(), SHORT, start_step=12, callbacks=[Watch()])
    assert seen == [13, 14, 15]
    assert fitted.history[-1]["lr"] == pytest.approx(SHORT.learning_rates(5)[14])


def test_masks_are_held_and_counted():
    model = network()
    masks = Masks({"0.weight": torch.rand(16, 6, generator=torch.Generator().manual_seed(0)) < 0.3})
    fitted = fit(model, blobs(), SHORT, masks=masks)
    assert fitted.masks == masks
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert fitted.metrics["kept"] == masks.kept
    momentum = fitted.optimizer[0]["0.momentum_buffer"]
    assert not bool(momentum[~masks["0.weight"]].any())
    assert not model[0].weight._backward_hooks


def test_the_order_of_a_step():
    order = []

    class Watch(Callback):
        def batch(self, step, model, x, y, ids):
            order.append("batch")
            return x, y

        def perturb(self, step, model):
            order.append("perturb")

        def gradients(self, step, model):
            order.append("gradients")

        def restore(self, step, model):
            order.append("restore")

        def event(self, step, model):
            order.append("event")

    class Spy(nn.Sequential):
        def forward(self, x):
            order.append("forward")
            return super().forward(x)

    model = Spy(*network())
    model[0].weight.register_hook(lambda g: order.append("backward"))
    fit(model, blobs(), Training(steps=1), callbacks=[Watch()])
    assert order == ["batch", "perturb", "forward", "backward", "gradients", "restore", "event"]


def test_a_perturbation_moves_the_gradient_and_is_taken_back():
    class Sharpness(Callback):
        def __init__(self, radius):
            self.radius = radius

        @torch.no_grad()
        def perturb(self, step, model):
            model[0].weight.add_(self.radius)

        @torch.no_grad()
        def restore(self, step, model):
            model[0].weight.sub_(self.radius)

    plain, same, moved = network(), network(), network()
    fit(plain, blobs(), SHORT)
    fit(same, blobs(), SHORT, callbacks=[Sharpness(0.0)])
    fit(moved, blobs(), SHORT, callbacks=[Sharpness(0.5)])
    assert torch.equal(flat(plain), flat(same))
    assert not torch.allclose(flat(plain), flat(moved), atol=1e-3)


def test_clipping_limits_the_step():
    choices = Training(steps=1, lr=1.0, schedule="constant", weight_decay=0.0, momentum=0.0, clip_norm=1e-3)
    model = network()
    before = flat(model)
    fit(model, blobs(), choices)
    assert (flat(model) - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_clipping_sees_masked_gradients():
    choices = Training(steps=1, lr=1.0, schedule="constant", weight_decay=0.0, momentum=0.0, clip_norm=1e-3)
    model = network()
    masks = Masks({"0.weight": torch.zeros(16, 6, dtype=torch.bool)})
    masks.apply(model)
    before = flat(model)
    fit(model, blobs(), choices, masks=masks)
    assert (flat(model) - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_distillation_follows_the_teacher():
    teacher, student = network(seed=3), network(seed=4)
    fit(teacher, blobs(), Training(epochs=10, batch_size=16))
    frozen = copy.deepcopy(teacher.state_dict())
    swapped = dataclasses.replace(blobs(), y=(blobs().y + 1) % 3)
    choices = Training(epochs=20, batch_size=16, lr=0.05, distill_weight=1.0, distill_temperature=2.0)
    fit(student, swapped, choices, teacher=teacher)
    agreement = (student(blobs().x).argmax(1) == teacher(blobs().x).argmax(1)).float().mean()
    assert agreement > 0.9
    assert all(torch.equal(frozen[n], t) for n, t in teacher.state_dict().items())


def test_teacher_and_weight_go_together():
    with pytest.raises(InvalidValue, match="both a teacher"):
        fit(network(), blobs(), Training(distill_weight=0.5))
    with pytest.raises(InvalidValue, match="both a teacher"):
        fit(network(), blobs(), Training(), teacher=network())


def test_an_objective_of_your_own():
    seen = []

    def objective(logits, y, ids):
        seen.append(ids)
        return F.cross_entropy(logits, y)

    plain, own = network(), network()
    fit(plain, blobs(), SHORT)
    fit(own, blobs(), SHORT, objective=objective)
    assert torch.equal(flat(plain), flat(own))
    assert torch.equal(torch.cat(seen[:5]).sort().values, torch.arange(80))


def test_best_is_chosen_by_validation():
    data = splits()
    choices = Training(epochs=6, batch_size=16, lr=3.0, schedule="constant", checkpoint_best=True)
    model = network()
    fitted = fit(model, data, choices)
    accuracies = [row["validation_accuracy"] for row in fitted.history]
    best = accuracies.index(max(accuracies))
    assert fitted.metrics["selected"] == "best"
    assert fitted.metrics["selected_step"] == fitted.history[best]["step"]
    assert fitted.metrics["validation_accuracy"] == max(accuracies)
    again = network()
    fit(again, data.train, choices.__class__(**{**choices.describe(), "checkpoint_best": False}), until=5 * (best + 1))
    assert torch.equal(flat(model), flat(again))
    with pytest.raises(InvalidValue, match="no validation examples"):
        fit(network(), blobs(), choices)


def test_best_never_takes_a_denser_network():
    from prunus.methods.gradual import Gradual

    choices = Training(epochs=6, batch_size=16, lr=0.05, checkpoint_best=True)
    model = network()
    fitted = fit(model, splits(), choices, method=Gradual(sparsity=0.9))
    assert fitted.masks is not None
    assert fitted.masks.kept == fitted.history[-1]["kept"] < fitted.history[0]["kept"]
    weight = model[0].weight
    assert not bool(weight[~fitted.masks["0.weight"]].any())


def test_a_loss_that_is_not_finite_is_named():
    class Poison(Callback):
        def batch(self, step, model, x, y, ids):
            return (x * float("nan") if step == 4 else x), y

    model = network()
    with pytest.raises(NonFinite, match=r"nan at step 4 of 15.*lower lr"):
        fit(model, blobs(), SHORT, callbacks=[Poison()])


def test_stopping_without_checkpoint_says_so():
    with pytest.raises(Stopped, match="after step 1 of 15; nothing was saved"):
        fit(network(), blobs(), SHORT, should_stop=lambda: True)


def test_progress_and_mode():
    seen = []
    model = network().eval()
    fit(model, blobs(), SHORT, on_progress=lambda step, last, loss: seen.append((step, last, loss)))
    assert not model.training
    assert [s for s, _, _ in seen] == list(range(1, 16))
    assert all(last == 15 and loss > 0 for _, last, loss in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"until": 16}, "do not lie in this training of 15 steps"),
        ({"start_step": 9, "until": 3}, "steps 9 to 3"),
        ({"rates": [0.1]}, "1 learning rates were given for a training of 15"),
    ],
)
def test_steps_that_cannot_be(arguments, message):
    with pytest.raises(InvalidValue, match=message):
        fit(network(), blobs(), SHORT, **arguments)


def test_zero_steps_change_nothing():
    model = network()
    before = flat(model)
    fitted = fit(model, splits(), Training(steps=0))
    assert torch.equal(flat(model), before)
    assert fitted.history == []
    assert fitted.metrics["train_loss"] is None


def test_bfloat16_trains():
    model = network()
    fitted = fit(model, splits(), dataclasses.replace(SHORT, bf16=True))
    assert fitted.metrics["validation_accuracy"] > 0.9
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_spare_vectors_on_request(name):
    model = network()
    optimizer = build(model, name, lr=0.1, weight_decay=0.5, decay_vectors=False)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim > 1}


def test_optimizer_refusals():
    with pytest.raises(UnknownName, match="Did you mean 'adam'"):
        build(network(), "adm", lr=0.1)
    with pytest.raises(UnknownName, match="momentum"):
        build(network(), "sgd", lr=0.1, momentun=0.9)
    with pytest.raises(UnknownName, match="betas"):
        build(network(), "adam", lr=0.1, momentum=0.9)
    with pytest.raises(InvalidValue, match="refuses"):
        build(network(), "sgd", lr=0.1, momentum=0.0, nesterov=True)
    with pytest.raises(InvalidValue, match="nothing to train"):
        build(network().requires_grad_(False), "sgd", lr=0.1)


def test_fused_kernels_agree_on_channels_last():
    def step(layout):
        torch.manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 3)).to(memory_format=layout)
        g = torch.Generator().manual_seed(0)
        data = Examples.from_arrays(torch.randn(32, 3, 8, 8, generator=g), torch.arange(32) % 3)
        fit(model, data, Training(epochs=2, batch_size=8))
        return torch.cat([p.detach().contiguous().reshape(-1) for p in model.parameters()])

    torch.testing.assert_close(step(torch.contiguous_format), step(torch.channels_last), rtol=1e-4, atol=1e-5)
