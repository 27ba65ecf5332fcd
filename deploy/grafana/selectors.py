"""What every query of the dashboard selects by, and figures of several kvtallys made one."""

from __future__ import annotations

HERE = 'instance=~"$instance"'  # GPUs, disks and kvtally itself know no model
ENGINES = f'model=~"$model",cluster=~"$cluster",namespace=~"$namespace",tenant=~"$tenant",{HERE}'
WINDOWED = f'{ENGINES},window="$window"'
RATE = "[$__rate_interval]"
IN_WINDOW = "[$window]"
# whose a windowed figure is: one kvtally's, of one model
GROUP = "job, instance, model, cluster, namespace, tenant"
WHO = "{{model}} {{cluster}} {{namespace}} {{tenant}} {{instance}}"
# kvtally's own process, among all that show process_* metrics
OF_KVTALLY = f"and on (job, instance) kvtally_build_info{{{HERE}}}"

PROMPTS = "kvtally_prompt_tokens_total"
OUTPUTS = "kvtally_generated_tokens_total"
UNIT_COST = "kvtally_cost_per_million_tokens"
HOURLY = "kvtally_cost_per_hour"
WATCHED = "kvtally_watched_seconds_total"


def per_covered_second(metric: str, own_labels: str) -> str:
    """How fast a counter of replicas grows, by replica, per second that its intervals cover.

    Both sides move at once, whenever the figures are worked out anew, so their ratio has none of the steps that a
    rate over the scraper's clock would show. A replica of which nothing new is known has no rate.
    """
    watched = f"(rate({WATCHED}{{{ENGINES}}}{RATE}) > 0)"
    return f"rate({metric}{{{ENGINES}}}{RATE}) / ignoring ({own_labels}) group_left () {watched}"


def share_of_watched(metric: str, label: str) -> str:
    """The growth of a cumulative gauge by one label, over the engine-seconds that passed meanwhile."""
    grown = f"sum by ({label}) (delta({metric}{{{ENGINES}}}{RATE}))"
    return f"{grown} / ignoring ({label}) group_left () (sum(delta({WATCHED}{{{ENGINES}}}{RATE})) > 0)"


def tokens_of(metric: str, source: str = "") -> str:
    """What tokens of one metric grew by in the window, with `source` a matcher that begins with a comma."""
    return f"increase({metric}{{{ENGINES}{source}}}{IN_WINDOW})"


ALL_TOKENS = f"{tokens_of(PROMPTS)} or {tokens_of(OUTPUTS)}"


def unit_cost(tokens: str, weights: str, view: str = "fully_loaded") -> str:
    """What a million tokens cost over all kvtallys of a model: what each of them says, by the tokens that it saw.

    Of one kvtally it is its own figure. The growth of kvtally_ledger_cost over that of tokens would be nearly the same,
    but for the window in which a price is corrected, which moves all of the ledger's past.
    """
    price = f'{UNIT_COST}{{{WINDOWED},view="{view}",tokens="{tokens}"}}'
    return _weighted(price, _weight(weights))


def cached_cost() -> str:
    """As `unit_cost`, of cached prompt tokens by tier."""
    price = f'{UNIT_COST}{{{WINDOWED},view="fully_loaded",tokens=~"input_cached_.*"}}'
    # a gauge, since what was estimated may be corrected: no weight where that lowers it
    grown = f"delta(kvtally_ledger_cached_tokens{{{ENGINES}}}{IN_WINDOW}) >= 0"
    return _weighted(price, _weight(f'label_replace({grown}, "tokens", "input_cached_$1", "tier", "(.+)")', ", tokens"))


def whole_cost() -> str:
    """What a million tokens cost, all of them and with idle time, over all kvtallys of a model.

    A kvtally that saw no tokens says no cost of a million; what its time cost is paid for those of the others. The
    basis is ASSUMED if any kvtally's is.
    """
    price = f'{UNIT_COST}{{{WINDOWED},view="fully_loaded",tokens="total"}}'
    hours = f"max by (job, instance) (increase({WATCHED}{{{HERE}}}{IN_WINDOW}) / 3600)"
    idle = f"1e6 * {HOURLY}{{{WINDOWED}}} * on (job, instance) group_left () {hours}"
    weight = _weight(ALL_TOKENS)
    over = "sum by (model, currency)"
    cost = f"{over} ({price} {weight} or on ({GROUP}) {idle}) / ({over} ((0 * {price} + 1) {weight}) > 0)"
    bases = "max by (model, currency, basis)"
    assumed = price.replace("}", ',basis="ASSUMED"}')
    basis = f"({bases} (0 * {assumed} + 1) or on (model, currency) {bases} (0 * {price} + 1))"
    return f"{cost} * on (model, currency) group_left (basis) {basis}"


def reused() -> str:
    """The share of prompt tokens that were reused over all kvtallys of a model, weighted as `unit_cost` is.

    Counters of prompt tokens alone would not do: of a prefill and a decode engine that serve together each counts the
    prompt, and what the second loads from the first is no reuse.
    """
    return _weighted(f"kvtally_reuse_ratio{{{WINDOWED}}}", _weight(tokens_of(PROMPTS)), "model")


def once_a_host(by: str, counted: str) -> str:
    """What kvtallys beside each other on one host all see, once: by host, which is the node, or else the address."""
    host = f'label_replace({counted}, "host", "$1", "instance", "(.*?)(?::[0-9]+)?")'
    return f'max by (host, {by}) (label_replace({host}, "host", "$1", "node", "(.+)"))'


def _weight(tokens: str, own_labels: str = "") -> str:
    return f"* on ({GROUP}{own_labels}) group_left () sum by ({GROUP}{own_labels}) ({tokens})"


def _weighted(figure: str, weight: str, by: str = "model, tokens, view, basis, currency") -> str:
    return f"sum by ({by}) ({figure} {weight}) / (sum by ({by}) ((0 * {figure} + 1) {weight}) > 0)"
