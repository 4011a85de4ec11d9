"""What the commands do, from configuration to result; a module for each command."""
