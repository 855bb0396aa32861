"""The bilateral solver, against the dense problem it stands for."""

import pytest
import torch

from regard.tasks.common.refine.bilateral import BilateralGrid, bilateral_solver


def picture(seed=0, size=(9, 11)):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, *size, generator=generator) * 40 + 60
    image[:, :, size[1] // 2 :] += 90
    return image, torch.rand(size, generator=generator, dtype=torch.float64)


def cells_of(image, spatial, luma, chroma):
    """The five coordinates of every pixel."""
    found = []
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            r, g, b = (float(c) for c in image[:, y, x].double())
            brightness = 0.299 * r + 0.587 * g + 0.114 * b
            blue, red = -0.168736 * r - 0.331264 * g + 0.5 * b + 128, 0.5 * r - 0.418688 * g - 0.081312 * b + 128
            found.append((int(y / spatial), int(x / spatial), int(brightness / luma), int(blue / chroma), int(red / chroma)))
    return found


def dense(image, spatial, luma, chroma):
    """Splat (cells, pixels) and blur (cells, cells) as matrices."""
    pixels = cells_of(image, spatial, luma, chroma)
    cells = sorted(set(pixels))
    splat = torch.zeros(len(cells), len(pixels), dtype=torch.float64)
    for i, cell in enumerate(pixels):
        splat[cells.index(cell), i] = 1
    blur = torch.zeros(len(cells), len(cells), dtype=torch.float64)
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            apart = [abs(m - n) for m, n in zip(a, b, strict=True)]
            blur[i, j] = 10 if a == b else float(sum(apart) == 1)
    return splat, blur


SIZES = {"spatial": 4.0, "luma": 16.0, "chroma": 24.0}


def test_grid_operators_are_their_matrices():
    image, values = picture()
    grid = BilateralGrid(image, **SIZES)
    splat, blur = dense(image, **SIZES)
    assert grid.count == len(splat)
    summed = grid.splat(values.flatten())
    torch.testing.assert_close(summed, splat @ values.flatten())
    torch.testing.assert_close(grid.blur(summed), blur @ summed)
    torch.testing.assert_close(grid.slice(summed), splat.T @ summed)


def test_it_solves_the_weighted_least_squares_problem_over_all_pairs_of_pixels():
    image, target = picture(1)
    trust = torch.rand(target.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    got = bilateral_solver(image, target, trust, **SIZES, smoothness=7.0, iterations=200)
    splat, blur = dense(image, **SIZES)
    mass = splat.sum(1)
    n = torch.ones_like(mass)
    for _ in range(10):
        n = (n * mass / (blur @ n)).sqrt()
    edges = n[:, None] * blur * n
    # sum over pairs of cells of W (y_i - y_j)^2 / 2, and over pixels of c (y - t)^2, derived by autograd, solved as it stands
    y = torch.zeros(len(mass), dtype=torch.float64)

    def cost(y):
        data = trust.flatten() * (splat.T @ y - target.flatten()).square()
        return 0.5 * 7.0 * 0.5 * (edges * (y[:, None] - y).square()).sum() + 0.5 * data.sum()

    hessian = torch.autograd.functional.hessian(cost, y)
    slope = torch.autograd.functional.jacobian(cost, y)
    expected = splat.T @ torch.linalg.solve(hessian, -slope)
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-4, atol=1e-4)  # conjugate gradients stop at 1e-5


def test_edges_of_the_image_stop_the_smoothing():
    image = torch.zeros(3, 24, 24)
    image[:, :, 10:] = 200.0
    target = (torch.arange(24) >= 8).double().expand(24, 24)  # two columns too far
    solved = bilateral_solver(image, target, spatial=8.0) > 0.5
    assert torch.equal(solved, image[0] > 100)


def test_another_shape_is_told():
    with pytest.raises(ValueError, match=r"expected an image \(3, height, width\).*got \(3, 4, 5\), \(5, 4\)"):
        bilateral_solver(torch.zeros(3, 4, 5), torch.zeros(5, 4))
