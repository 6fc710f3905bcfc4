"""Where scores of responses come from."""
