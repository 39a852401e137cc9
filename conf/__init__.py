"""Hydra configuration files, found as ``pkg://interloom.conf``. YAML selects; nothing here computes."""
