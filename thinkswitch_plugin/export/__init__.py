"""Both modes of a pair as two LoRAs of one base, for one server with one copy of the weights."""
