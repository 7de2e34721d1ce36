from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from blockffn_compile.speculative.tree import (
    BEST_CHILD,
    MAX_NODES,
    DraftTree,
    TreeBuilder,
    best_nodes,
)


def make_tree(tokens, parents, log_probs) -> DraftTree:
    return DraftTree(
        np.array(tokens, np.int64), np.array(parents, np.int64), np.array(log_probs, np.float32)
    )


def random_tree(rng: random.Random, n: int) -> DraftTree:
    """Random shape; log-probabilities on a coarse grid, so that there are ties."""
    parents, log_probs = [-1], [0.0]
    for node in range(1, n):
        parents.append(rng.randrange(node))
        log_probs.append(log_probs[parents[node]] - rng.choice([0, 0.5, 1, 2]))
    return make_tree(rng.sample(range(1000), n), parents, log_probs)


#   0 -> 1 -> 3
#   0 -> 2 -> 4 -> 5
TREE = make_tree([7, 1, 2, 1, 1, 7], [-1, 0, 0, 1, 2, 4], [0, -1, -2, -3, -2, -2.5])


def test_relations() -> None:
    assert len(TREE) == 6
    assert TREE.children(0) == {1: 1, 2: 2}
    assert TREE.children(4) == {7: 5}
    assert TREE.children(5) == {}
    assert TREE.depths.tolist() == [0, 1, 1, 2, 2, 3]
    assert TREE.ancestors.tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b110101]
    assert TREE.depths.dtype == TREE.ancestors.dtype == np.int64


def test_ancestors_of_the_last_node_use_the_sign_bit() -> None:
    masks = DraftTree.chain(0, range(1, MAX_NODES), [0.0] * (MAX_NODES - 1)).ancestors
    assert masks[-1] == -1
    assert masks[-2] == 2**63 - 1


def test_ancestors_and_depths_agree_with_a_walk_to_the_root() -> None:
    rng = random.Random(0)
    for n in (1, 2, 17, MAX_NODES):
        tree = random_tree(rng, n)
        for node in range(n):
            walk, at = set(), node
            while at != -1:
                walk.add(at)
                at = int(tree.parents[at])
            mask = int(tree.ancestors[node]) % 2**64
            assert {j for j in range(64) if mask >> j & 1} == walk
            assert tree.depths[node] == len(walk) - 1


def test_root_and_chain() -> None:
    root = DraftTree.root(5)
    assert (root.tokens.tolist(), root.parents.tolist(), root.log_probs.tolist()) == (
        [5],
        [-1],
        [0],
    )
    chain = DraftTree.chain(5, [6, 5], [-0.5, -1.5])
    assert chain.tokens.tolist() == [5, 6, 5]
    assert chain.parents.tolist() == [-1, 0, 1]
    assert chain.log_probs.tolist() == [0, -0.5, -1.5]


@pytest.mark.parametrize(
    ("tokens", "parents", "log_probs", "reason"),
    [
        ([], [], [], "1 to 64 nodes, got 0"),
        (range(65), range(-1, 64), [0] * 65, "1 to 64 nodes, got 65"),
        ([1, 2], [-1], [0, 0], r"parents must be int64 \[2\]"),
        ([1, 2], [-1, 0], [0], r"log_probs must be float32 \[2\]"),
        ([[1, 2]], [-1], [0], r"tokens must be int64 \[1\]"),
        ([1, 2], [0, 0], [0, 0], "node 0 is the root"),
        ([1, 2], [-1, 0], [-1, -1], "node 0 is the root"),
        ([1, 2], [-1, -1], [0, 0], "node 1: its parent -1"),
        ([1, 2], [-1, 1], [0, 0], "node 1: its parent 1"),
        ([1, 2, 3], [-1, 2, 1], [0, 0, 0], "node 1: its parent 2"),
        ([1, 2, 2], [-1, 0, 0], [0, 0, 0], "node 2: node 0 has another child of token 2"),
        ([1, 2], [-1, 0], [0, 0.1], "node 1: log-probability"),
        ([1, 2], [-1, 0], [0, -np.inf], "node 1: log-probability"),
        ([1, 2], [-1, 0], [0, np.nan], "node 1: log-probability"),
        ([1, 2, 3], [-1, 0, 1], [0, -2, -1], "node 2: log-probability"),
    ],
    ids=str,
)
def test_bad_trees_are_refused(tokens, parents, log_probs, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        make_tree(tokens, parents, log_probs)


def test_wrong_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens must be int64 \[1\], got int32"):
        DraftTree(np.zeros(1, np.int32), np.array([-1]), np.zeros(1, np.float32))


def test_check() -> None:
    TREE.check(vocab_size=8, max_nodes=6)
    with pytest.raises(ValueError, match=r"outside 0\.\.6"):
        TREE.check(vocab_size=7, max_nodes=6)
    with pytest.raises(ValueError, match="6 nodes, at most 5"):
        TREE.check(vocab_size=8, max_nodes=5)
    with pytest.raises(ValueError, match=r"outside 0\.\.7"):
        DraftTree.root(-1).check(vocab_size=8, max_nodes=1)


def closed_subsets(tree: DraftTree, n: int):
    for rest in itertools.combinations(range(1, len(tree)), n - 1):
        nodes = [0, *rest]
        if all(int(tree.parents[node]) in nodes for node in rest):
            yield nodes


def test_best_nodes_are_the_best_closed_subset() -> None:
    rng = random.Random(1)
    for _ in range(40):
        tree = random_tree(rng, rng.randint(1, 9))
        for n in range(1, len(tree) + 1):
            kept = best_nodes(tree, n)
            subsets = [tree.subtree(nodes) for nodes in closed_subsets(tree, n)]
            best = max(np.exp(subset.log_probs).sum() for subset in subsets)
            assert len(kept) == n
            assert np.exp(kept.log_probs).sum() == pytest.approx(best)
            # The same nodes by their tokens, which are distinct, in the same order.
            order = [tree.tokens.tolist().index(token) for token in kept.tokens]
            assert order == sorted(order)
            for node, parent in enumerate(kept.parents[1:], start=1):
                assert kept.tokens[parent] == tree.tokens[tree.parents[order[node]]]
            assert kept.log_probs.tolist() == tree.log_probs[order].tolist()


def test_best_nodes_break_ties_by_index() -> None:
    tree = make_tree([0, 1, 2, 3, 4], [-1, 0, 0, 0, 0], [0, -1, -1, -0.5, -1])
    assert best_nodes(tree, 3).tokens.tolist() == [0, 1, 3]


def test_best_nodes_of_none_one_and_all() -> None:
    assert best_nodes(TREE, 6) is TREE
    assert best_nodes(TREE, 99) is TREE
    assert best_nodes(TREE, 1).tokens.tolist() == [7]
    with pytest.raises(ValueError, match="at least one node"):
        best_nodes(TREE, 0)


def test_builder_expands_the_most_probable_only() -> None:
    builder = TreeBuilder(9)
    assert builder.frontier == [0]
    assert builder.hope == BEST_CHILD
    assert builder.expand([[1, 2]], [[-1.0, -0.1]]) == [1, 2]
    # Joint: nodes 3 to 6 are -1.5, -4.0, -0.3, -0.4.
    assert builder.expand([[3, 4], [3, 5]], [[-0.5, -3.0], [-0.2, -0.3]]) == [5, 6]
    assert builder.frontier == [5, 6]
    assert builder.hope == pytest.approx(BEST_CHILD * np.exp(-0.3))
    assert builder.tokens == [9, 1, 2, 3, 4, 3, 5]
    assert builder.parents == [-1, 0, 0, 1, 1, 2, 2]
    tree = builder.build(5)
    assert tree.tokens.tolist() == [9, 1, 2, 3, 5]
    assert tree.parents.tolist() == [-1, 0, 0, 2, 2]
    assert tree.log_probs == pytest.approx([0, -1, -0.1, -0.3, -0.4])
    assert len(builder.build(64)) == 7
    assert builder.build(1).tokens.tolist() == [9]


def test_builder_equals_best_nodes_of_everything_it_was_given() -> None:
    rng = random.Random(2)
    for width in (1, 3):
        builder = TreeBuilder(0)
        for _ in range(4):
            rows = [[rng.uniform(-3, 0) for _ in range(width)] for _ in builder.frontier]
            builder.expand([rng.sample(range(50), width) for _ in rows], rows)
        everything = builder.build(64)
        for n in (1, 2, 5, len(everything)):
            kept, expected = builder.build(n), best_nodes(everything, n)
            assert kept.tokens.tolist() == expected.tokens.tolist()
            assert kept.parents.tolist() == expected.parents.tolist()


def test_builder_takes_rounding_above_zero() -> None:
    builder = TreeBuilder(0)
    builder.expand([[1]], [[1e-7]])
    assert builder.build(2).log_probs.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("tokens", "log_probs"),
    [
        ([], []),
        ([[]], [[]]),
        ([[1], [2]], [[0.0], [0.0]]),
        ([[1, 2]], [[0.0]]),
        ([[1]], []),
    ],
)
def test_builder_refuses_other_shapes(tokens, log_probs) -> None:
    with pytest.raises(ValueError, match="the frontier has 1 nodes"):
        TreeBuilder(0).expand(tokens, log_probs)


def test_builder_refuses_ragged_rows() -> None:
    builder = TreeBuilder(0)
    builder.expand([[1, 2]], [[0.0, 0.0]])
    with pytest.raises(ValueError, match="the frontier has 2 nodes"):
        builder.expand([[1, 2], [1]], [[0.0, 0.0], [0.0]])


def test_builder_refuses_equal_siblings_and_bad_probabilities() -> None:
    builder = TreeBuilder(0)
    builder.expand([[1, 1]], [[-1.0, -1.0]])
    with pytest.raises(ValueError, match="another child of token 1"):
        builder.build(3)
    builder = TreeBuilder(0)
    builder.expand([[1, 2]], [[-1.0, -np.inf]])
    assert len(builder.build(2)) == 2
    with pytest.raises(ValueError, match="not finite"):
        builder.build(3)
