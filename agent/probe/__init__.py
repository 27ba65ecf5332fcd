"""Probes: how long an engine takes for prompts of known length, asked of it while it idles, or found in a log.

plan      which prompts are sent, and the words in which a person is asked first
engine    an engine's completions and counters over HTTP
measure   sends the prompts, and keeps what nothing disturbed
passive   the requests of a log that tell as much
"""
