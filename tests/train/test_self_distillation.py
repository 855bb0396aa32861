"""Self-distillation: its loss by loops, its teacher, its centre, and what a few steps change."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from regard import create_model
from regard.train.self_distillation import (
    MaskedSelfDistillation,
    PrototypeHead,
    SelfDistillation,
    balanced_targets,
    block_masks,
    self_distillation_loss,
)

KIND = torch.float64


def test_the_loss_is_the_cross_entropy_over_pairs_of_different_crops():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(3, 5, generator=generator, dtype=KIND) for _ in range(4)]
    teacher = [torch.randn(3, 5, generator=generator, dtype=KIND) for _ in range(2)]
    centre = torch.randn(5, generator=generator, dtype=KIND)
    terms = []
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            if i == j:
                continue
            for row in range(3):
                targets = [math.exp((float(a) - float(c)) / 0.04) for a, c in zip(t[row], centre, strict=True)]
                answers = [math.exp(float(a) / 0.1) for a in s[row]]
                terms.append(-sum(a / sum(targets) * math.log(b / sum(answers)) for a, b in zip(targets, answers, strict=True)))
    assert float(self_distillation_loss(student, teacher, centre)) == pytest.approx(sum(terms) / len(terms))
    assert len(terms) == 6 * 3


def test_the_teacher_gets_no_gradient():
    student = [torch.randn(2, 4, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, 4, requires_grad=True)]
    self_distillation_loss(student, teacher, torch.zeros(4)).backward()
    assert teacher[0].grad is None
    assert student[0].grad is None  # the only pair is that with the other crop
    assert float(student[1].grad.abs().max()) > 0


def test_a_single_crop_is_refused():
    with pytest.raises(ValueError, match="2 or more of the student; got 1, 1"):
        self_distillation_loss([torch.zeros(1, 2)], [torch.zeros(1, 2)], torch.zeros(2))


def test_the_head_gives_cosines_with_prototypes():
    torch.manual_seed(0)
    head = PrototypeHead(6, 8, 4, 5)
    x = torch.randn(3, 6)
    inside, got = head.mlp(x), head(x)
    for i in range(3):
        for j in range(5):
            expected = torch.cosine_similarity(inside[i], head.prototypes[j], 0)
            torch.testing.assert_close(got[i, j], expected)


class Pooled(nn.Module):
    """Any features of any size of crop."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)

    def forward(self, x):
        return self.conv(x).tanh().mean((2, 3))


def crops(count=12):
    generator = torch.Generator().manual_seed(3)
    sides = (16, 16, 8, 8)
    return [[torch.randn(3, side, side, generator=generator) for side in sides] for _ in range(count)]


def trained(steps):
    torch.manual_seed(0)
    module = SelfDistillation(Pooled(), 6, 3, prototypes=7, hidden=8, bottleneck=4, warmup=0.4)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(crops(), 4))
    return module, before


def test_the_teacher_follows_the_student_ever_more_slowly_and_its_outputs_make_the_centre():
    module, before = trained(1)
    kept = 1 - (1 - 0.99) * 0.5 * (1 + math.cos(math.pi / 3))
    moved = 0
    for name, fast in module.student.named_parameters():
        slow = module.average.get_parameter(name)
        torch.testing.assert_close(slow, kept * before[f"average.{name}"] + (1 - kept) * fast)
        moved += int(not torch.equal(fast, before[f"student.{name}"]))
    assert moved == len(list(module.student.parameters())) - 1
    torch.manual_seed(0)
    fresh = SelfDistillation(Pooled(), 6, 3, prototypes=7, hidden=8, bottleneck=4)
    large = torch.cat([torch.stack([sample[i] for sample in crops()[:4]]) for i in range(2)])
    torch.testing.assert_close(module.centre, 0.1 * fresh.average(large).mean(0))


def test_prototypes_rest_during_the_warm_up_and_learn_afterwards():
    name = "student.1.prototypes"
    module, before = trained(1)
    assert torch.equal(module.get_parameter(name), before[name])
    module, before = trained(3)
    assert not torch.equal(module.get_parameter(name), before[name])


def test_a_run_depends_on_its_seed_alone():
    first, second = (trained(3)[0].teacher.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_balanced_targets_share_out_the_prototypes_in_turns():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=KIND)
    shares = [[math.exp(float(x) / 0.5) for x in row] for row in logits]
    for _ in range(2):
        columns = [sum(row[j] for row in shares) for j in range(4)]
        shares = [[x / total for x, total in zip(row, columns, strict=True)] for row in shares]
        shares = [[x / sum(row) for x in row] for row in shares]
    got = balanced_targets(logits, temperature=0.5, rounds=2)
    torch.testing.assert_close(got, torch.tensor(shares, dtype=KIND))
    torch.testing.assert_close(balanced_targets(logits, rounds=200).sum(0), torch.full((4,), 1.5, dtype=KIND))


def test_masks_hide_rectangles_until_the_share_is_reached():
    torch.manual_seed(0)
    masks = block_masks(200, (6, 8), (0.25, 0.5))
    counts = masks.flatten(1).sum(1)
    assert int(counts.min()) >= 12
    assert int(counts.max()) < 24 + 3 * 4  # one rectangle more than wanted at most
    assert float(counts.float().std()) > 2
    assert float(masks.float().mean(0).min()) > 0.1  # anywhere


def masked_module():
    torch.manual_seed(0)
    model = create_model("dino_vits8", dim=16, depth=2, head_dim=8, image_size=32, num_classes=0)
    return MaskedSelfDistillation(model, 16, 3, patch_size=8, prototypes=7, hidden=8, bottleneck=4, warmup=0.4)


def test_the_student_guesses_the_patches_that_it_does_not_see():
    """The loss beyond that of class tokens, patch by patch; the teacher sees every patch and balances over all of them."""
    module = masked_module().double()
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(2, 3, side, side, generator=generator, dtype=KIND) for side in (32, 32, 16)]
    module.log = lambda *args, **options: None  # no trainer is there
    torch.manual_seed(5)
    loss = module.training_step(crops, 0)
    torch.manual_seed(5)
    masks = block_masks(4, (4, 4), (0.1, 0.7))
    large = torch.cat(crops[:2])
    shown = large.clone()
    for image, mask in zip(shown, masks, strict=True):
        for row, column in mask.nonzero().tolist():
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0.0
    body, head = module.student
    tokens, seen = body.forward_features(shown), module.average[0].forward_features(large)
    targets = balanced_targets(module.average_patch_head(seen[:, 1:]).flatten(0, 1))
    guesses = module.patch_head(tokens[:, 1:]).flatten(0, 1).detach()
    terms = []
    for patch in masks.flatten().nonzero().squeeze(1).tolist():
        answers = [math.exp(float(x) / 0.1) for x in guesses[patch]]
        terms.append(-sum(float(t) * math.log(x / sum(answers)) for t, x in zip(targets[patch], answers, strict=True)))
    student = [*head(tokens[:, 0]).chunk(2), module.student(crops[2])]
    teacher = module.average(large).chunk(2)
    classes = self_distillation_loss(student, teacher, torch.zeros(7, dtype=KIND))
    assert loss.item() == pytest.approx(classes.item() + sum(terms) / len(terms))
    loss.backward()
    assert all(p.grad is None for p in module.average_patch_head.parameters())
    assert float(module.patch_head.prototypes.grad.abs().max()) > 0


def test_the_teacher_of_patches_follows_too():
    module = masked_module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    sides = (32, 32, 16)
    samples = [[torch.randn(3, side, side) for side in sides] for _ in range(4)]
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(samples, 4))
    kept = 1 - (1 - 0.99) * 0.5 * (1 + math.cos(math.pi / 3))
    for name, fast in module.patch_head.named_parameters():
        slow = module.average_patch_head.get_parameter(name)
        assert not torch.equal(fast, before[f"patch_head.{name}"])
        torch.testing.assert_close(slow, kept * before[f"average_patch_head.{name}"] + (1 - kept) * fast)
