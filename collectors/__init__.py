"""One file per telemetry source; nothing here knows of money or SQL."""
