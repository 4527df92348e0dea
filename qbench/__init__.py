"""qbench: run quantization papers from one command and set the published numbers beside our own."""

__version__ = "0.1.0"
