"""What every query of the dashboard selects by, and the rates that follow from figures which move once a minute."""

from __future__ import annotations

HERE = 'instance=~"$instance"'  # GPUs, disks and kvtally itself know no model
ENGINES = f'model=~"$model",cluster=~"$cluster",namespace=~"$namespace",{HERE}'
WINDOWED = f'{ENGINES},window="$window"'
RATE = "[$__rate_interval]"
# kvtally's own process, among all that show process_* metrics
OF_KVTALLY = f"and on (job, instance) kvtally_build_info{{{HERE}}}"


def per_covered_second(metric: str, own_labels: str) -> str:
    """How fast a counter of replicas grows, by replica, per second that its intervals cover.

    Both sides move at once, whenever the figures are worked out anew, so their ratio has none of the steps that a
    rate over the scraper's clock would show. A replica of which nothing new is known has no rate.
    """
    watched = f"(rate(kvtally_watched_seconds_total{{{ENGINES}}}{RATE}) > 0)"
    return f"rate({metric}{{{ENGINES}}}{RATE}) / ignoring ({own_labels}) group_left () {watched}"


def share_of_watched(metric: str, label: str) -> str:
    """The growth of a cumulative gauge by one label, over the engine-seconds that passed meanwhile."""
    grown = f"sum by ({label}) (delta({metric}{{{ENGINES}}}{RATE}))"
    return (
        f"{grown} / ignoring ({label}) group_left () (sum(delta(kvtally_watched_seconds_total{{{ENGINES}}}{RATE})) > 0)"
    )
