"""From a configuration to a stage that the loop runs."""
