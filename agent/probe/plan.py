"""Which cold prompts a probe sends, and what a person is told before it does (METHOD 4.1, M4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTHS = 7
RUNS = 2  # of each length
SHORTEST_TOKENS, LONGEST_TOKENS = 512, 32_768
TOKENS_MAX = 200_000  # of all prompts together
SECONDS_MAX = 300.0  # for all of it
DISCARDS_MAX = 5  # prompts that are sent again
_LEAST_TOKENS = 128  # a model that takes no more has no prefill worth the name


def plan(max_model_len: int, token_budget: int | None = None, *, tokens_max: int = TOKENS_MAX) -> tuple[int, ...]:
    """Seven prompt lengths from 512 to 32,768 tokens, less where the model or `tokens_max` allows less.

    Evenly spaced by ratio; the one nearest to the token budget is the budget itself, the largest step there is.
    CollectError if not even prompts of 128 tokens may be sent.
    """
    longest = min(LONGEST_TOKENS, max_model_len - 1)  # one token is generated
    while longest >= _LEAST_TOKENS:
        shortest = min(SHORTEST_TOKENS, longest // 4)
        lengths = [round(shortest * (longest / shortest) ** (at / (LENGTHS - 1))) for at in range(LENGTHS)]
        if token_budget is not None and shortest <= token_budget <= longest:
            nearest = min(range(LENGTHS), key=lambda at: abs(math.log(lengths[at] / token_budget)))
            lengths[nearest] = token_budget
        if prompt_tokens(lengths) <= tokens_max:
            return tuple(lengths)
        longest = longest * 3 // 4
    raise CollectError(
        f"no prompts of {_LEAST_TOKENS} tokens can be sent: the model takes {max_model_len:,} tokens, and "
        f"{tokens_max:,} may be sent in all"
    )


def warm_up_tokens(lengths: Sequence[int]) -> int:
    """Length of the first prompt, which is not counted."""
    return sorted(lengths)[len(lengths) // 2]


def prompt_tokens(lengths: Sequence[int]) -> int:
    """All tokens of the prompts over these lengths, if none is sent again."""
    return RUNS * sum(lengths) + warm_up_tokens(lengths)


def announce(
    lengths: Sequence[int],
    model: str,
    where: str,
    *,
    tokens_per_second: float | None = None,
    seconds_max: float = SECONDS_MAX,
) -> str:
    """What a probe will do to the engine at `where`, in words to agree to.

    `tokens_per_second` is how fast it computes prompts, as far as anything is known of that.
    """
    total = prompt_tokens(lengths)
    lasts = "seconds on a large GPU and minutes on a CPU"
    if tokens_per_second:
        lasts = f"about {math.ceil(total / tokens_per_second):,} s at {tokens_per_second:,.0f} tokens a second"
    shown = ", ".join(f"{length:,}" for length in sorted(lengths))
    return f"""\
kvtally will send {RUNS * len(lengths) + 1} prompts with {total:,} tokens in all to {model} at {where}, one at a time:
{RUNS} each of {shown} tokens, after one to warm up.
It takes {lasts}, and ends after {seconds_max:,.0f} s in any case.

- The prompts are random token ids. No user's text is read or sent, and the one token of each answer is thrown away.
- A prompt goes out only while the engine has no other request; one that arrives meanwhile may wait for that prompt.
  A prompt that was disturbed is sent again, {DISCARDS_MAX} times in all.
- The engine counts them like any request, in its metrics and its log, and so does the ledger.
- Their KV blocks, under a salt that nobody else has, stay until their room is needed: blocks that were not used for
  longest may have to go for them, in the engine and in the stores behind its KV connector.
"""
