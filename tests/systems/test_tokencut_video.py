"""TokenCut of videos: edges from two kinds of features, one graph of all frames, moving photographs over moving photographs."""

import pytest
import torch
import torch.nn.functional as F
from scipy import linalg

from regard import create_model
from regard.data import photograph
from regard.models.pretrained import normalised, tiny_dino
from regard.studies.tokencut import find_video_object, flow_colours, optical_flow, saliency, tokencut_video
from regard.studies.tokencut.cutting import affinity, last_keys, normalised_cut, strong_edges

KIND = torch.float64
FUSED = {"mean": lambda a, b: (a + b) / 2, "max": max, "min": min}


def random_kinds(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, dim, generator=generator, dtype=KIND) for dim in (4, 3)]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("fusion", FUSED)
def test_edges_are_fused_cosines_against_the_threshold(fusion, binary):
    kinds = random_kinds()
    edges = affinity(kinds, threshold=0.1, weak=1e-3, binary=binary, fusion=fusion)
    strong = strong_edges(kinds, threshold=0.1, fusion=fusion)
    for i in range(9):
        for j in range(9):
            cosines = []
            for kind in kinds:
                a, b = kind[i].tolist(), kind[j].tolist()
                dot, square_a, square_b = (sum(x * y for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (a, a), (b, b)))
                cosines.append(dot / (square_a * square_b) ** 0.5)
            fused = FUSED[fusion](*cosines)
            expected = (1.0 if binary else fused) if fused > 0.1 else 1e-3
            assert float(edges[i, j]) == pytest.approx(expected, abs=1e-12)
            assert bool(strong[i, j]) == (fused > 0.1)


@pytest.mark.parametrize("count", [40, 1030])  # by the whole spectrum, and by Lanczos' method
def test_the_cut_of_strong_and_weak_edges_is_that_of_scipys_generalised_solver(count):
    kinds = random_kinds(count, seed=1)
    strong = strong_edges(kinds, threshold=0.3)
    edges = torch.where(strong, 1.0, 1e-5).double()
    degree = edges.sum(1)
    values, vectors = linalg.eigh((degree.diag() - edges).numpy(), degree.diag().numpy(), subset_by_index=[1, 2])
    assert values[1] - values[0] > 1e-6  # so that there is one such vector
    expected = torch.from_numpy(vectors[:, 0])
    for given in (strong, edges):
        got = normalised_cut(given)
        got = got * torch.sign(got @ (degree * expected))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        assert float(got @ (degree * got)) == pytest.approx(1.0)


def test_a_nearly_disconnected_graph_is_cut_between_its_parts_by_lanczos_too():
    """Its eigenvalue is 2e-5 below that of the constant vector, so that single precision would not tell them apart."""
    labels = torch.arange(1500) % 5 == 0
    y = normalised_cut(labels[:, None] == labels)
    assert max(float(y[labels].std()), float(y[~labels].std())) < 1e-9
    sides = y > y.mean()
    assert torch.equal(sides, labels if sides[0] else ~labels)


def wandering(frames=4, rows=7, columns=9, *, noise=0.05, seed=0):
    """Features of two directions: inside a rectangle that wanders to the right and out of sight, and outside."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(frames, rows, columns, dtype=torch.bool)
    for t in range(frames):
        inside[t, 1 + t : 4 + t, 1 + 3 * t : 4 + 3 * t] = True
    directions = torch.linalg.qr(torch.randn(16, 2, generator=generator, dtype=KIND)).Q.T
    features = torch.where(inside[..., None], directions[0], directions[1])
    return features + noise * torch.randn(*inside.shape, 16, generator=generator, dtype=KIND), inside


@pytest.mark.parametrize("seed", range(3))
def test_a_wandering_object_is_recovered_exactly_in_each_frame(seed):
    features, inside = wandering(seed=seed)
    found = tokencut_video(features, patch_size=8, image_size=(54, 70))
    assert torch.equal(found.mask, inside)
    assert len(found.seeds) == 1
    assert inside[found.seeds[0]]
    assert found.boxes == ((8, 8, 32, 32), (32, 16, 56, 40), (56, 24, 70, 48), None)
    assert float(found.eigenvector[inside].min()) > float(found.eigenvector.mean()) > float(found.eigenvector[~inside].max())


def test_the_object_need_not_be_connected():
    features, inside = wandering()
    features[0, 6, 8] = features[0, 2, 2]
    found = tokencut_video(features)
    assert bool(found.mask[0, 6, 8])
    assert int(found.mask.sum()) == int(inside.sum()) + 1


def test_an_object_that_looks_like_its_background_is_found_by_its_movement():
    """And the other way round; a fusion that asks for both needs both to agree, one that asks for either takes either."""
    motion, inside = wandering()
    generator = torch.Generator().manual_seed(5)
    same = torch.ones(1, 16, dtype=KIND) + 0.1 * torch.randn(*inside.shape, 16, generator=generator, dtype=KIND)
    for kinds in ([same, motion], [motion, same]):
        assert torch.equal(tokencut_video(kinds, fusion="min").mask, inside)
        assert torch.equal(tokencut_video(kinds, fusion="mean", threshold=0.75).mask, inside)
        assert bool(strong_edges([kind.flatten(0, 2) for kind in kinds], threshold=0.3, fusion="max").all())


def test_long_videos_are_cut_in_turns():
    features, _ = wandering(frames=5, noise=0.4, seed=2)
    whole = tokencut_video(features, graph_frames=2)
    assert len(whole.seeds) == 3
    for number, part in enumerate(features.split(2)):
        alone = tokencut_video(part)
        frames = slice(2 * number, 2 * number + 2)
        # bitwise: the same operators on the same shapes
        torch.testing.assert_close(whole.eigenvector[frames], alone.eigenvector, rtol=0, atol=0)
        assert torch.equal(whole.mask[frames], alone.mask)
        (frame, row, column) = alone.seeds[0]
        assert whole.seeds[number] == (2 * number + frame, row, column)
        assert bool(whole.mask[whole.seeds[number]])


def test_keys_of_frames_and_of_pictures_of_flow_make_the_graph():
    torch.manual_seed(0)
    model = create_model("dino_vits16", dim=24, depth=2, head_dim=8, image_size=64).eval()
    frames, flow = torch.randn(5, 3, 64, 80), torch.randn(3, 3, 64, 80)
    found = find_video_object(model, frames, flow, batch=2)
    pictures = torch.cat([flow, flow[-1:], flow[-1:]])  # what has no flow has that of the last that has
    expected = tokencut_video([last_keys(model, frames), last_keys(model, pictures)], patch_size=16)
    assert torch.equal(found.mask, expected.mask)
    assert found.boxes == expected.boxes
    alone = find_video_object(model, frames)
    assert torch.equal(alone.mask, tokencut_video(last_keys(model, frames)).mask)
    assert not torch.equal(alone.mask, found.mask)


HEIGHT, WIDTH, RADIUS = 96, 128, 22
STEP, PAN = (3, 8), (1, -3)
"""Pixels down and to the right per frame, of the object and of what is behind it."""


def shrunk(name, side):
    picture = photograph(name).float()
    scale = side / min(picture.shape[1:])
    size = [round(n * scale) for n in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 255)


def filmed(thing, background, frames=4):
    """A disc cut out of one photograph moves over another one, which the camera pans: frames, the disc, the true flow."""
    side = 2 * RADIUS + 1
    surface, behind = shrunk(thing, side)[:, :side, :side], shrunk(background, 160)
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pictures, discs, flows = [], [], []
    for t in range(frames):
        top, left, y, x = 20 - PAN[0] * t, 20 - PAN[1] * t, 30 + STEP[0] * t, 30 + STEP[1] * t
        picture = behind[:, top : top + HEIGHT, left : left + WIDTH].clone()
        disc = (rows - y).square() + (columns - x).square() <= RADIUS**2
        picture[:, disc] = surface[:, rows[disc] - y + RADIUS, columns[disc] - x + RADIUS]
        right, down = (torch.where(disc, float(STEP[axis]), float(PAN[axis])) for axis in (1, 0))
        pictures.append(picture)
        discs.append(disc)
        flows.append(torch.stack([right, down]))
    return torch.stack(pictures), torch.stack(discs), torch.stack(flows)


def overlaps(mask, discs):
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return [float((a & b).sum() / (a | b).sum()) for a, b in zip(pixels, discs, strict=True)]


@pytest.mark.parametrize(("thing", "background"), [("rocket", "china"), ("motorcycle", "coffee"), ("flower", "chelsea")])
def test_a_moving_photograph_is_found_where_its_look_alone_does_not_tell(thing, background):
    """Packaged weights, true flow, published threshold and fusion, patches of 8 pixels."""
    frames, discs, flow = filmed(thing, background)
    pictures = normalised(flow_colours(flow[:3]))  # the last frame has none
    found = find_video_object(tiny_dino(), normalised(frames), pictures)
    assert min(overlaps(found.mask, discs)[:3]) > 0.7
    assert max(overlaps(find_video_object(tiny_dino(), normalised(frames)).mask, discs)) < 0.5


def test_a_disc_of_its_backgrounds_texture_is_found_where_both_kinds_must_agree():
    """The mean of both lets patches of one texture belong together across its border."""
    frames, discs, flow = filmed("gravel", "gravel")
    pictures = normalised(flow_colours(flow))
    found = find_video_object(tiny_dino(), normalised(frames), pictures, fusion="min")
    assert min(overlaps(found.mask, discs)) > 0.7


def test_saliency_sharpens_the_mask_of_a_frame():
    frames, discs, flow = filmed("coffee", "grass", 2)
    found = find_video_object(tiny_dino(), normalised(frames), normalised(flow_colours(flow)))
    rough = overlaps(found.mask, discs)
    for frame, mask, disc, before in zip(frames, found.mask, discs, rough, strict=True):
        _, fine = saliency(frame, mask, spatial=16.0, luma=16.0, chroma=8.0)
        assert float((fine & disc).sum() / (fine | disc).sum()) > before


def test_estimated_flow_does_as_well():
    frames, discs, _ = filmed("coffee", "grass", 3)
    pictures = normalised(flow_colours(optical_flow(frames)))
    found = find_video_object(tiny_dino(), normalised(frames), pictures)
    assert min(overlaps(found.mask, discs)[:2]) > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokencut_video(torch.zeros(4, 5, 6)), r"expected features \(frames, rows, columns, dim\).*got \(4, 5, 6\)"),
        (lambda: tokencut_video([torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 3, 3)]), r"got \(1, 2, 2, 3\), \(1, 2, 3, 3\)"),
        (lambda: tokencut_video(torch.ones(1, 2, 2, 3), graph_frames=0), "1 or more frames of a graph.*got 0, 1e-05"),
        (lambda: tokencut_video(torch.ones(1, 2, 2, 3), weak=0.0), "a positive weak edge; got 90, 0.0"),
        (lambda: tokencut_video(torch.ones(1, 2, 2, 3), fusion="sum"), "fusion is one of mean, max, min; got 'sum'"),
        (
            lambda: find_video_object(torch.nn.Identity(), torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)),
            r"flow for 1 or more of \(1, 3, 8, 8\); got \(2, 3, 8, 8\)",
        ),
        (lambda: affinity([torch.ones(2, 3), torch.ones(3, 3)]), r"the same n in every kind.*got \(2, 3\), \(3, 3\)"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
