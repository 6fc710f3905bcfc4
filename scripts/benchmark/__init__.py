"""Steps of this library and of TRL, measured in turn: time, memory, share of the peak."""
