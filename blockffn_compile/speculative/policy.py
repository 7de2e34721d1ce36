"""How many nodes to verify, from what a step costs and how drafts have fared."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from blockffn_compile.speculative.tree import MAX_NODES, DraftTree, most_probable

#: What each step keeps of the record of earlier ones: of how much a drafter gained (the last 10
#: steps, so that one which starts to lose is dropped soon), and of how often drafts were right.
KEEP_GAIN, KEEP_HITS = 0.9, 0.98

#: Steps that gained nothing, which every record starts from and falls back to: the burden of proof
#: is on the drafter.
PRIOR_STEPS = 0.5

#: Share of the time that trying out drafters may cost, all together; and what trying each may cost
#: at the very start, in plain steps.
TRIAL_SHARE, TRIAL_START = 0.01, 1.0

#: Nodes of a trial: little more than a plain step, but enough to see a drafter succeed.
TRIAL_NODES = 4

#: How far a measured step moves the cost of its size: the first, as the start may have been in a
#: busy moment, and one of many, as costs follow the median, whatever a single step took.
FIRST_COST_STEP, COST_STEP = 0.1, 0.01


class Choice(NamedTuple):
    """What to do in the next step.

    Attributes:
        drafter: its index; None for a plain step, without a draft.
        nodes: size of the largest tree to ask it for, root included.
        trial: it is not expected to pay, but to show how the drafter fares now.
        rate: tokens that a millisecond yields without this step.
    """

    drafter: int | None
    nodes: int
    trial: bool
    rate: float = 0.0


#: A step without a draft.
PLAIN = Choice(None, 1, False)


@dataclass
class _Record:
    """How a drafter fares: sums over its steps, the older counting less."""

    trial_ms: float  # what trials of it may cost now
    draft_ms: float  # mean of what one draft takes
    steps: float = 0.0
    tokens: float = 0.0
    ms: float = 0.0
    reach: float = TRIAL_NODES  # the largest tree verified, by and by forgotten
    last_used: int = 0  # number of its latest step

    @property
    def tokens_a_step(self) -> float:
        return (PRIOR_STEPS + self.tokens) / (PRIOR_STEPS + self.steps)


class TreePolicy:
    """Sizes trees so that a unit of time yields the most tokens.

    Each step is one round of::

        choice = policy.choose()
        tree = drafters[choice.drafter].propose(root, choice.nodes, choice.rate)
        tree = policy.trim(choice, tree)
        ...                                                          # verify, accept
        policy.update(choice, tree, accepted.path, draft_ms, verify_ms)

    **Which drafter.** The one of the largest rate, the tokens of its latest steps by their
    milliseconds, drafting included, if that is above the rate of plain decoding, 1 / cost[1]. Old
    steps are forgotten by and by.

    **How many nodes.** A node's probability is the product, over the nodes of its path, of the
    drafter's conditional probability times a correction for the depth: how often drafts of that
    depth were right, by how often the drafter expected them to be. The most probable n nodes then
    yield 1 + sum(p_i) tokens, and the n is taken which maximises

        1 + sum(p_i) - rate * cost[n],

    tokens less those that the time would yield elsewhere; it maximises the rate in the long run
    (Dinkelbach, 1967). What the draft took is spent by then, and changes nothing.

    **What verifying costs** is known from the start, and follows what steps really take: more as
    the text grows longer, less where the nodes of trees share their experts.  A size that was not
    used yet keeps its ratio to those that are: what is wrong at the start is mostly wrong for all.

    **Trials.** A drafter that does not pay is tried again with a small tree whenever it has saved
    up what that is expected to lose: together, drafters get a hundredth of all time, and what
    their trials win.  So a change in the text is noticed at a bounded loss, soonest where drafting
    is cheap, and one that is about as good as plain decoding is tried all the time.

    Args:
        cost: milliseconds of one verification by number of nodes; a tree between two sizes costs
            as much as the larger one. Must have 1, a plain step.
        drafters: milliseconds that a draft of each is expected to take, until it has been seen.

    Raises:
        ValueError: a cost is missing or not positive, a size not within 1..64.
    """

    def __init__(self, cost: Mapping[int, float], drafters: Sequence[float] = ()) -> None:
        if 1 not in cost or any(not 1 <= size <= MAX_NODES for size in cost):
            raise ValueError(f"sizes must be within 1..{MAX_NODES}, with 1, got {sorted(cost)}")
        if any(not 0 < ms < math.inf for ms in cost.values()):
            raise ValueError(f"costs must be positive, got {dict(cost)}")
        if any(not 0 <= ms < math.inf for ms in drafters):
            raise ValueError(f"times of drafters must be >= 0, got {list(drafters)}")
        self._sizes = sorted(cost)
        self._costs = [cost[size] for size in self._sizes]
        self._measured = [0] * len(self._sizes)  # steps of each size
        self._records = [_Record(TRIAL_START * cost[1], ms) for ms in drafters]
        # Per drafter and depth: how many drafts were right, and how many it expected to be.
        self._hits = np.zeros((len(drafters), 2, MAX_NODES))
        self._steps = 0
        # Plain steps since the records were last brought up to date, and until that is needed.
        self._plain, self._wait = 0, 0

    def choose(self) -> Choice:
        """The drafter to ask next, and for how large a tree: double what was worth it lately."""
        if self._plain < self._wait:
            return PLAIN
        self._pass_plain_steps()
        best, rate = self._best()
        nodes = min(TRIAL_NODES, self._sizes[-1])
        # What a trial is expected to lose, above what is saved up for it.
        missing = {
            i: self._cost(nodes) + record.draft_ms - record.tokens_a_step / rate - record.trial_ms
            for i, record in enumerate(self._records)
            if i != best
        }
        ready = [i for i, ms in missing.items() if ms <= 0]
        if ready:
            oldest = min(ready, key=lambda i: self._records[i].last_used)
            return Choice(oldest, nodes, True, rate)
        if best is None:
            income = TRIAL_SHARE * self._costs[0] / max(1, len(self._records))
            self._wait = math.ceil(min(missing.values()) / income) if missing else 1
            return PLAIN
        wanted = bisect.bisect_left(self._sizes, 2 * self._records[best].reach)
        return Choice(best, self._sizes[min(wanted, len(self._sizes) - 1)], False, rate)

    def trim(self, choice: Choice, tree: DraftTree) -> DraftTree:
        """The part of a proposed tree that is worth verifying; a trial's is left as it is."""
        if choice.drafter is None or choice.trial or len(tree) == 1:
            return tree
        probs = self._probabilities(choice.drafter, tree)
        expected = list(accumulate(sorted(probs, reverse=True)))  # tokens, by number of nodes
        _, rate = self._best()

        def worth(i: int) -> float:
            return expected[min(self._sizes[i], len(tree)) - 1] - rate * self._costs[i]

        size = self._sizes[max(range(len(self._sizes)), key=worth)]
        return tree if size >= len(tree) else tree.subtree(most_probable(probs, size))

    def update(
        self,
        choice: Choice,
        tree: DraftTree,
        path: Sequence[int],
        draft_ms: float,
        verify_ms: float | None = None,
    ) -> None:
        """Takes in the outcome of a step.

        Args:
            choice: what :meth:`choose` said.
            tree: what was verified.
            path: its accepted nodes, root included.
            draft_ms: milliseconds that the drafter took, 0 without one. What happens only once,
                such as compilation, does not belong in there.
            verify_ms: milliseconds of the verification; None where that says nothing of trees of
                this size.
        """
        if verify_ms is not None:
            size = bisect.bisect_left(self._sizes, len(tree))
            self._measured[size] += 1
            step = max(COST_STEP, FIRST_COST_STEP / self._measured[size])
            factor = 1 + math.copysign(step, verify_ms - self._costs[size])
            for i, steps in enumerate(self._measured):
                if i == size or not steps:
                    self._costs[i] *= factor
        if choice.drafter is None:
            self._plain += 1
            return
        self._pass_plain_steps()
        spent = self._cost(len(tree)) + draft_ms
        if choice.trial:
            _, rate = self._best()
            self._records[choice.drafter].trial_ms -= spent - len(path) / rate
        self._age(1, spent)
        record = self._records[choice.drafter]
        record.steps += 1
        record.tokens += len(path)
        record.ms += spent
        record.draft_ms += (draft_ms - record.draft_ms) * (1 - KEEP_GAIN if record.last_used else 1)
        record.last_used = self._steps
        record.reach = max(len(tree), KEEP_GAIN * record.reach)
        hits, expected = self._hits[choice.drafter]
        for depth, node in enumerate(path, start=1):
            children = tree.children(node)
            if children:
                nodes = list(children.values())
                hits[depth] += depth < len(path)
                expected[depth] += np.exp(tree.log_probs[nodes] - tree.log_probs[node]).sum()

    def _pass_plain_steps(self) -> None:
        if self._plain:
            self._age(self._plain, self._plain * self._costs[0])
        self._plain = self._wait = 0

    def _age(self, steps: int, ms: float) -> None:
        """Lets that much time go by for the records."""
        self._steps += steps
        self._hits *= KEEP_HITS**steps
        for record in self._records:
            record.steps *= KEEP_GAIN**steps
            record.tokens *= KEEP_GAIN**steps
            record.ms *= KEEP_GAIN**steps
            share = TRIAL_SHARE * ms / len(self._records)
            record.trial_ms = min(record.trial_ms + share, self._costs[-1] + record.draft_ms)

    def _best(self) -> tuple[int | None, float]:
        """The drafter to use, and its tokens per millisecond; None where plain decoding is best."""
        best, best_rate = None, 1 / self._costs[0]
        for i, record in enumerate(self._records):
            tokens = PRIOR_STEPS + record.tokens
            rate = tokens / (PRIOR_STEPS * (self._costs[0] + record.draft_ms) + record.ms)
            if rate > best_rate:
                best, best_rate = i, rate
        return best, best_rate

    def _cost(self, nodes: int) -> float:
        return self._costs[bisect.bisect_left(self._sizes, nodes)]

    def _probabilities(self, drafter: int, tree: DraftTree) -> list[float]:
        """[N], of each node to be accepted; never above the parent's."""
        hits, expected = self._hits[drafter]
        corrections = [1.0]
        # With few drafts at a depth to go by, it takes after the depth above.
        for right, hoped in zip(hits.tolist()[1:], expected.tolist()[1:], strict=True):
            corrections.append((corrections[-1] + right) / (1 + hoped))
        parents, log_probs = tree.parents.tolist(), tree.log_probs.tolist()
        shares, together = [1.0], [0.0] * len(tree)
        for node in range(1, len(tree)):
            parent = parents[node]
            shares.append(math.exp(log_probs[node] - log_probs[parent]))
            together[parent] += shares[node]
        probs, depths = [1.0], [0]
        for node in range(1, len(tree)):
            parent = parents[node]
            depths.append(depths[parent] + 1)
            # Siblings exclude each other: together they are not raised above 1.
            share = shares[node] * corrections[depths[node]]
            share /= max(1.0, together[parent] * corrections[depths[node]])
            probs.append(probs[parent] * min(share, 1.0))
        return probs
