"""Plain float networks: torch only, readable as graphs, nothing of quantization inside."""
