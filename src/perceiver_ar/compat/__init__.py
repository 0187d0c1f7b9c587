"""Names, arguments and weights of other implementations, on top of our network."""
