"""Rows about money: what a million tokens cost, where it goes, what reuse saved."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, Row
from deploy.grafana.selectors import (
    ALL_TOKENS,
    ENGINES,
    HOURLY,
    OUTPUTS,
    PROMPTS,
    RATE,
    UNIT_COST,
    WHO,
    WINDOWED,
    cached_cost,
    reused,
    share_of_watched,
    tokens_of,
    unit_cost,
    whole_cost,
)

from kvtally.agent.words import TIERS

MINUTES = "5m"  # a gauge that moves once a minute needs several of them for a slope


def _saved(measure: str, meaning: str) -> Panel:
    selected = f'kvtally_savings_amount{{{WINDOWED},measure="{measure}",currency="$currency"}}'
    return Panel(
        f"{measure.capitalize()} saving in the window ($currency)",
        f"{meaning} In the window that ends with the ledger's newest interval; the band is the 90 % interval (bounds "
        "of several models and kvtallys are added up, which is wider). MODELLED: a counterfactual. Too few data are "
        f'left out: see the status. `kvtally savings --since 1h` says "{measure}".',
        (Query(f"sum by (bound) ({selected})", "{{bound}}"),),
        "none",
        bands=(("low", "high"),),
    )


COST = Row(
    "What a million tokens cost",
    (
        Panel(
            "Cost of a million tokens",
            "Everything that was paid in the window, idle time included, over all its prompt and output tokens. The "
            "legend tells the basis: MEASURED prices are your own rates, ASSUMED ones list prices "
            "(`kvtally rates add` ends that), be it on one kvtally of several. Over all chosen kvtallys, each weighted "
            "by its tokens: of one it is what `kvtally cost --since 1h --by model` says, fully_loaded, total.",
            (Query(whole_cost(), "{{model}} ({{basis}} {{currency}})"),),
            "none",
            "stat",
            height=4,
        ),
        Panel(
            "Cost of an hour",
            "What the window cost over the hours that intervals cover, added up over all chosen kvtallys. The model "
            "unallocated is GPUs that no engine holds (a sidecar tells its own engines' alone). `kvtally cost`: "
            "cost.total over covered_seconds.",
            (Query(f"sum by (model, currency) ({HOURLY}{{{WINDOWED}}})", "{{model}} ({{currency}})"),),
            "none",
            "stat",
            height=4,
        ),
        Panel(
            "Reused prompt tokens",
            "Share of the window's prompt tokens that engines did not compute, whatever tier they came from. Over all "
            "chosen kvtallys, each weighted by its prompt tokens. MEASURED by the engines' counters.",
            (Query(reused(), "{{model}}"),),
            "percentunit",
            "stat",
            height=4,
        ),
        Panel(
            "Cost of a million tokens: total, input, output",
            "Fully loaded, over the window at each instant. Input is computed and cached prompt tokens together. Input "
            "and output are told apart by the step law (MODELLED); a line is missing where they cannot be. Each "
            "kvtally's figure is weighted by its tokens; one without tokens adds its time to the total alone.",
            (
                Query(whole_cost(), "{{model}} total ({{basis}} {{currency}})"),
                Query(unit_cost("input", tokens_of(PROMPTS)), "{{model}} {{tokens}} ({{basis}} {{currency}})"),
                Query(unit_cost("output", tokens_of(OUTPUTS)), "{{model}} {{tokens}} ({{basis}} {{currency}})"),
            ),
            "none",
            is_log=True,
        ),
        Panel(
            "Cost of a million prompt tokens: computed, or cached by tier",
            "Fully loaded, over the window. What a cached token costs is its load and the room that its tier takes; 0 "
            "for HBM, whose price is the GPU's. Where loading cannot be parted from computing its tier has no line. "
            "Each kvtally's figure is weighted by its tokens of that kind.",
            (
                Query(
                    unit_cost("input_computed", tokens_of(PROMPTS, ',source="computed"')),
                    "{{model}} {{tokens}} ({{basis}} {{currency}})",
                ),
                Query(cached_cost(), "{{model}} {{tokens}} ({{basis}} {{currency}})"),
            ),
            "none",
        ),
        Panel(
            "Fully loaded, and active time alone",
            "All tokens: with everything that was paid, and with what the time cost in which the engine worked. The "
            "distance is idle, asleep, warm-up and unallocated time.",
            (
                Query(whole_cost(), "{{model}} fully_loaded ({{basis}} {{currency}})"),
                Query(unit_cost("total", ALL_TOKENS, "active"), "{{model}} {{view}} ({{basis}} {{currency}})"),
            ),
            "none",
        ),
    ),
)
BY_KVTALLY = Row(
    "One kvtally beside another",
    (
        Panel(
            "Cost of a million tokens, by kvtally",
            "As each says it of its own engines, all tokens and idle time: `kvtally cost --since 1h` on its host. One "
            "that saw no tokens has no line.",
            (
                Query(
                    f'{UNIT_COST}{{{WINDOWED},view="fully_loaded",tokens="total"}}',
                    f"{WHO} ({{{{basis}}}} {{{{currency}}}})",
                ),
            ),
            "none",
            is_log=True,
        ),
        Panel(
            "Reused prompt tokens, by kvtally",
            "Share of the window's prompt tokens that its engines did not compute. One that lies far below the others "
            "gets requests whose prefixes lie elsewhere.",
            (Query(f"kvtally_reuse_ratio{{{WINDOWED}}}", WHO),),
            "percentunit",
        ),
        Panel(
            "Coverage of the window, by kvtally",
            "Share of the time for which there are intervals; the rest is in no figure.",
            (Query(f"kvtally_coverage_ratio{{{WINDOWED}}}", WHO),),
            "percentunit",
            most=1,
        ),
    ),
)
WHERE_IT_GOES = Row(
    "Where the money goes",
    (
        Panel(
            "Engine time by state",
            "Shares of the engine-seconds that passed. idle, asleep, warm_up and unallocated are MEASURED; prefill, "
            "decode, stall (waiting for KV) and store (writing it) are MODELLED by the step law. undivided is "
            "work that no law parts yet (`kvtally calibrate`). `kvtally cost`: engine_seconds.",
            (Query(f"{share_of_watched('kvtally_ledger_engine_seconds', 'state')} != 0", "{{state}}"),),
            "percentunit",
            "stack",
            interval="2m",
            most=1,
        ),
        Panel(
            "Cost by resource, per hour",
            "The slope of what the ledger holds, by resource. A price or a reservation that is corrected later moves "
            "the ledger's past: the line then shows one step, down as well as up.",
            (
                Query(
                    f"3600 * sum by (resource, currency) (deriv(kvtally_ledger_cost{{{ENGINES}}}{RATE})) != 0",
                    "{{resource}} ({{currency}})",
                ),
            ),
            "none",
            "stack",
            interval=MINUTES,
        ),
        Panel(
            "Cost by state, in the time range shown",
            "The same money cut the other way: occupied is time in which the engine worked, the rest served nobody. "
            "`kvtally cost --since … --until …`: of_which.",
            (
                Query(
                    f"sum by (state, currency) (delta(kvtally_ledger_state_cost{{{ENGINES}}}[$__range])) != 0",
                    "{{state}} ({{currency}})",
                ),
            ),
            "none",
            "bars",
        ),
    ),
)
SAVINGS = Row(
    "What reuse saved",
    (
        _saved("gross", "What the reused prompt tokens would have cost to compute."),
        _saved(
            "net", "Gross less what loading, storing and holding KV cost: below 0, the cache costs more than it saves."
        ),
        _saved(
            "realised",
            "The part of net that fell into time in which requests waited for capacity, less all that is held.",
        ),
        Panel(
            "Net engine-seconds by tier, in the window",
            "What each tier avoided less what it took, with its 90 % interval (bounds of several models and kvtallys "
            "are added up). A tier whose upper bound is below 0 is a proven loss: the alert KvtallyTierLoss.",
            (Query(f"sum by (tier, bound) (kvtally_tier_savings_engine_seconds{{{WINDOWED}}})", "{{tier}} {{bound}}"),),
            "s",
            width=12,
            bands=tuple((f"{tier} low", f"{tier} high") for tier in TIERS),
        ),
        Panel(
            "Status of the savings",
            "How far the savings can be believed: ok; lower_bound (preemptions above 5 %); not_proven (the interval "
            "contains 0); insufficient_data; unreconciled (counters contradict each other). "
            "`kvtally savings --explain` says why. By kvtally.",
            (Query(f"kvtally_savings_status{{{WINDOWED}}}", f"{WHO}: {{{{status}}}}"),),
            "none",
            "states",
            width=12,
        ),
    ),
)
