"""The commands, from configuration to result; one module per command."""
