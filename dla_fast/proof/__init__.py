"""How an op is proved and timed: the numerical contract, times and memory, and the name of the machine."""
