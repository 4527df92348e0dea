"""The parts of scripts/attack.py."""
