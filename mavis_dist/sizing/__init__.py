"""What a config needs on given machines: memory, time and cost by arithmetic, and a simulation of many machines."""
