"""Trees from dependencies, against walks from token to token."""

import pytest
import torch

from regard.ops.tokens.tree import dependency_tree, subtrees


def naive_tree(weights: list[list[float]]) -> list[int]:
    n = len(weights)
    ranked = sorted(range(n), key=lambda s: (sum(weights[s]), s))
    root = ranked[-1]
    parents = [root if s == root else max((r for r in range(n) if r != s), key=lambda r: weights[s][r]) for s in range(n)]

    def head_of(s: int) -> int:
        for _ in range(n):  # now on the cycle, or at the root
            s = parents[s]
        cycle = [s]
        while parents[cycle[-1]] != s:
            cycle.append(parents[cycle[-1]])
        return max(cycle, key=ranked.index)

    heads = [head_of(s) for s in range(n)]
    for head in set(heads) - {root}:
        open_to = [r for r in range(n) if ranked.index(heads[r]) > ranked.index(head)]
        parents[head] = max(open_to, key=lambda r: weights[head][r])
    return parents


def ways_up(parents: list[int]) -> list[list[int]]:
    """From each token to the root; a walk that does not end would be too long."""
    ways = []
    for s in range(len(parents)):
        way = [s]
        while parents[way[-1]] != way[-1] and len(way) <= len(parents):
            way.append(parents[way[-1]])
        ways.append(way)
    return ways


@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_parents_are_those_of_the_definition_and_make_one_tree(n):
    weights = torch.rand(40, n, n, dtype=torch.float64) ** 4 * torch.rand(40, n, 1, dtype=torch.float64)
    ours = dependency_tree(weights).tolist()
    kept = 0
    for parents, each in zip(ours, weights.tolist(), strict=True):
        assert parents == naive_tree(each)
        edges = sum(parents[s] != s for s in range(n))
        assert edges == n - 1
        ends = {way[-1] for way in ways_up(parents)}
        assert ends == {max(range(n), key=lambda s: sum(each[s]))}
        kept += sum(parents[s] == max((r for r in range(n) if r != s), key=lambda r: each[s][r]) for s in range(n) if n > 1)
    assert n < 3 or kept > 0.7 * 40 * (n - 1)  # few parents are not the largest weight


def test_nested_cycles_hang_on_what_sends_more():
    # 0 and 1 point at each other, so do 2 and 3, 4 is the root that nobody points at, and 5 hangs on the first cycle
    #              0    1    2    3    4    5
    weights = [[0.0, 5.0, 0.0, 1.0, 0.0, 0.0],
               [4.0, 0.0, 0.1, 0.0, 0.0, 0.0],
               [0.5, 0.0, 0.0, 2.0, 0.0, 0.0],
               [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
               [0.0, 0.0, 0.0, 0.0, 0.0, 9.0],
               [0.0, 0.2, 0.0, 0.0, 0.0, 0.0]]  # fmt: skip
    # heads: 0 (sends 6) and 2 (sends 2.5). 2 may join 0's or the root's, and likes 0; 0 may only join the root
    assert dependency_tree(torch.tensor([weights])).tolist() == [[4, 0, 0, 2, 4, 1]]


def test_equal_sums_and_weights_still_make_a_tree():
    for weights in (torch.ones(1, 9, 9), torch.zeros(1, 9, 9), torch.eye(9)[None]):
        parents = dependency_tree(weights)[0].tolist()
        assert {way[-1] for way in ways_up(parents)} == {8}


def test_subtrees_hold_what_hangs_below():
    parents = dependency_tree(torch.rand(5, 20, 20))
    ours = subtrees(parents)
    chain = torch.arange(33).sub(1).clamp(min=0)[None]
    for each, found in ((p, f) for ps, fs in ((parents, ours), (chain, subtrees(chain))) for p, f in zip(ps, fs, strict=True)):
        for token, way in enumerate(ways_up(each.tolist())):
            assert found[:, token].nonzero().flatten().tolist() == sorted(way)


def test_trees_compile_and_need_square_matrices():
    weights = torch.rand(2, 12, 12)
    compiled = torch.compile(dependency_tree, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights), dependency_tree(weights))
    with pytest.raises(ValueError, match=r"\(batch, n, n\) with n of at least 1; got \(2, 3, 4\)"):
        dependency_tree(torch.rand(2, 3, 4))
