"""Our steps beside those of TRL: how long, how much memory, and how far from the floor."""
