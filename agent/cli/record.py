"""`kvtally record`."""

from __future__ import annotations

from pathlib import Path

import click

from kvtally.agent.cli.options import Seconds, environment_with, interval_option


@click.command(epilog="\b\nExample: ten minutes, packed into one file\n  kvtally record h100-monday --for 10m --pack")
@click.argument("folder", metavar="DIR")
@click.option(
    "--for",
    "duration",
    type=Seconds(min=1),
    metavar="LENGTH",
    help="Stop by itself after this long: 15s, 10m, 1h, or seconds.",
)
@interval_option
@click.option("--gpu-every", type=Seconds(min=0), metavar="SECONDS", help="Sample GPUs this often. [default: as pages]")
@click.option(
    "--max-size",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="GIB",
    help="Stop by itself before its files grow larger, all engines together.",
)
@click.option("--pack", "packed", is_flag=True, help="Also write DIR.tar.xz.")
@click.option("--config", "config_path", metavar="FILE", help="TOML config. [$KVTALLY_CONFIG]")
def record(
    folder: str,
    duration: float | None,
    interval: float | None,
    gpu_every: float | None,
    max_size: int,
    packed: bool,
    config_path: str | None,
) -> None:
    """Write a recording of the engines on this host: whole pages, GPU and host samples. Stops on SIGTERM or Ctrl-C."""
    from kvtally.agent.config import load
    from kvtally.agent.log import Log
    from kvtally.agent.recorder import Recorder

    config = load(config_path, environment_with(interval))
    log = Log(config.log.format, config.log.level)
    recorder = Recorder(config, Path(folder), log, max_bytes=max_size * 2**30, gpu_every_seconds=gpu_every or None)
    recorded = recorder.run(duration_seconds=duration)
    click.echo(f"{folder}: {recorded}", err=True)
    if packed:
        from kvtally.agent.recording_writer import pack

        for each in recorded.folders:
            pack(each, each.with_name(f"{each.name}.tar.xz"))
            click.echo(f"{each}.tar.xz", err=True)
