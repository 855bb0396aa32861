"""Pictures of optical flow: the published wheel pixel by pixel; and the flow of moved photographs."""

import math

import peers
import pytest
import torch

from regard.data import photograph
from regard.studies.tokencut import flow_colours, optical_flow


def naive_wheel():
    """55 hues as the source lists them: six ramps, one channel moving in each."""
    hues = []
    hues += [(255, math.floor(255 * i / 15), 0) for i in range(15)]
    hues += [(255 - math.floor(255 * i / 6), 255, 0) for i in range(6)]
    hues += [(0, 255, math.floor(255 * i / 4)) for i in range(4)]
    hues += [(0, 255 - math.floor(255 * i / 11), 255) for i in range(11)]
    hues += [(math.floor(255 * i / 13), 0, 255) for i in range(13)]
    hues += [(255, 0, 255 - math.floor(255 * i / 6)) for i in range(6)]
    return hues


def test_colours_are_those_of_the_published_wheel():
    flow = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow[:, 0, 0] = 0.0
    flow[:, 0, 1] = torch.tensor([1.5, 0.0])  # the seam of the wheel
    wheel = naive_wheel()
    assert len(wheel) == 55
    longest = max(math.hypot(*flow[:, i, j].tolist()) for i in range(5) for j in range(7)) + 1e-5
    got = flow_colours(flow)
    assert got.dtype == torch.uint8
    for i in range(5):
        for j in range(7):
            right, down = (float(x) / longest for x in flow[:, i, j])
            place = (math.atan2(-down, -right) / math.pi + 1) / 2 * 54
            low = math.floor(place)
            for channel in range(3):
                first, second = wheel[low][channel] / 255, wheel[(low + 1) % 55][channel] / 255
                hue = (1 - (place - low)) * first + (place - low) * second
                expected = math.floor(255 * (1 - math.hypot(right, down) * (1 - hue)))
                assert int(got[channel, i, j]) == expected
    assert got[:, 0, 0].tolist() == [255, 255, 255]


def test_each_picture_has_its_own_scale():
    flow = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    both = flow_colours(flow * torch.tensor([1.0, 10.0, 0.1])[:, None, None, None])
    for one, alone in zip(both, flow, strict=True):
        assert int((one.int() - flow_colours(alone).int()).abs().max()) <= 1  # 1e-5 beside the longest


@pytest.mark.peer
def test_colours_are_torchvisions():
    peers.timm()  # makes torchvision importable
    from torchvision.utils import flow_to_image

    flow = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(2))
    apart = (flow_colours(flow).int() - flow_to_image(flow).int()).abs()
    assert int(apart.max()) <= 1  # it rounds down from single precision
    assert float((apart > 0).float().mean()) < 0.01


def test_the_flow_of_a_moved_photograph_is_its_movement():
    picture = photograph("gravel")[:, 100:148, 100:148].float()
    frames = torch.stack([picture.roll((step, 2 * step), (1, 2)) for step in range(3)])
    flow = optical_flow(frames, gap=2)
    assert flow.shape == (1, 2, 48, 48)
    inside = flow[0, :, 8:-8, 8:-8].flatten(1)
    torch.testing.assert_close(inside.median(-1)[0], torch.tensor([4.0, 2.0]), rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow_colours(torch.zeros(3, 4, 4)), r"expected flow \(..., 2, height, width\); got \(3, 4, 4\)"),
        (lambda: optical_flow(torch.zeros(2, 3, 4, 4), gap=2), r"more than gap=2 >= 1; got \(2, 3, 4, 4\)"),
        (lambda: optical_flow(torch.zeros(2, 1, 4, 4)), r"got \(2, 1, 4, 4\)"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
